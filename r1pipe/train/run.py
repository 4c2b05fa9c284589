"""One job's run folder: config in; metrics, progress, checkpoints and the record out.

Every stage script runs inside `with open_run(folder) as run:`. Rank 0 writes; all ranks call.
"""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from r1pipe.chat.template import Chat
from r1pipe.config import (
    EvaluateConfig,
    HFConfig,
    RejectionConfig,
    RLConfig,
    RunConfig,
    StageConfig,
    read_config,
)
from r1pipe.config.benchmark import task_of
from r1pipe.config.transfer import samplings
from r1pipe.core.errors import (
    CheckpointError,
    ConfigError,
    EnvironmentProblem,
    R1pipeError,
    disk_is_full,
    no_room,
    record_error,
)
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Prompt
from r1pipe.data import open_data
from r1pipe.data.source import Source, check_data_unchanged
from r1pipe.model.hf.files import check_architecture
from r1pipe.rewards.programs import limits
from r1pipe.runs import checkpoints, locks, machine, stopping
from r1pipe.runs.files import read_object, write_json
from r1pipe.runs.lineage.lookup import with_relocated_parents
from r1pipe.runs.provenance import job_record
from r1pipe.runs.record import Metrics, Result
from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.patches import exit_immediately_with
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.resumable import Resumable
from r1pipe.train.rollout import Sampler, open_sampler

EMPTY = Prompt("", "", "", "")
PROGRESS_EVERY_S = 0.25  # seconds between progress lines of the same kind

log = logging.getLogger("r1pipe")
S = TypeVar("S", bound=StageConfig)


class Run(Resumable[S]):
    """A stage script's view of its run folder. Made by `open_run`."""

    chat: Chat  # after load_chat
    data: Source  # after load_data
    _sampler: Sampler | None = None

    def __init__(self, folder: RunFolder, config: RunConfig, stage: S):
        super().__init__(folder, config, stage)
        limits.use(stage.code)
        self.memory_gb: dict[str, float] = {}  # of this session
        self._progressed: dict[str, float] = {}
        for subfolder in (folder.checkpoints, folder.data):
            subfolder.mkdir(parents=True, exist_ok=True)
        self.seconds["starting"] = self.elapsed()

    # --- randomness: named, seeded streams, never the global one

    def seed(self, stream: str, step: int = 0) -> int:
        """63 bits that depend only on the run's seed, the stream's name and the step."""
        digest = hashlib.sha256(f"{self.config.seed}/{stream}/{step}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def rng(self, stream: str, step: int = 0) -> np.random.Generator:
        return np.random.default_rng(self.seed(stream, step))

    def generator(self, stream: str, step: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(stream, step))

    def shared_progress(self, what: str, done: int, total: int, unit: str) -> None:
        """As `progress`, of work that the ranks share out evenly: `done` by this rank, of `total` by all."""
        self.progress(what, min(done * self.world_size, total), total, unit)

    def progress(self, what: str, done: int, total: int, unit: str, **show: float) -> None:
        """Report how far a piece of work is; cheap enough to call in every iteration of a loop."""
        now = time.monotonic()
        if done < total and now - self._progressed.get(what, 0.0) < PROGRESS_EVERY_S:
            return
        self._progressed[what] = now
        self.show(what=what, done=done, total=total, unit=unit, show=show)

    @property
    def sampler(self) -> Sampler:
        """What the job draws completions with; needs the chat."""
        if self._sampler is None:
            source, log_folder = self._tokenizer_folder(), self.folder.log
            ranks = Ranks(self.config.engine)
            show = partial(self.progress, "starting vLLM", unit="s")
            self._sampler = open_sampler(self.config, self.chat, ranks, source, log_folder, show)
        return self._sampler

    def close(self) -> None:
        """Free what lives outside this process."""
        if self._sampler is not None:
            self._sampler.close()

    # --- inputs

    def load_chat(self) -> Chat:
        """The weights' tokenizer and template, with `chat.system`.

        Raises CheckpointError if another checkpoint read has others, and ConfigError if the system prompt
        leaves no room for a question.
        """
        if isinstance(self.config.model, HFConfig):
            check_architecture(self._tokenizer_folder())  # before data is read
        system = self.config.chat.system
        chat = Chat.load(self._tokenizer_folder(), system)
        for stage, parent in self.config.reads_from.items():
            other = Chat.load(parent.checkpoint, system)
            if (other.template_hash, other.tokenizer_hash) != (chat.template_hash, chat.tokenizer_hash):
                raise CheckpointError(
                    f"{parent.checkpoint} (stage {stage}) has another tokenizer or chat template than "
                    f"{self._tokenizer_folder()}; take both from one pipeline"
                )
        if chat.system:
            self._check_room(chat)
            log.info("system prompt: %s", chat.system)
        self.chat = chat
        if self.config.sampler.url is not None:
            _ = self.sampler  # a server of another model is refused before anything is loaded
        return chat

    def _check_room(self, chat: Chat) -> None:
        """Raises ConfigError where the system prompt and an answer fill the model's context."""
        longest = {"stage.eval.max_tokens": self.stage.eval.max_tokens}
        if isinstance(self.stage, RejectionConfig | RLConfig):
            longest["stage.sampling.max_tokens"] = self.stage.sampling.max_tokens
        longest |= {
            f"{key}.max_tokens": sampling.max_tokens for key, sampling in samplings(self.stage).items()
        }
        context, tokens = self.config.model.max_position_embeddings, len(chat.prompt_tokens(EMPTY))
        for key, length in longest.items():
            if tokens + length >= context:
                raise ConfigError(
                    f"the system prompt takes {tokens} tokens, which with {key}={length} leaves no room for "
                    f"a question in model.max_position_embeddings={context}; shorten chat.system, or lower "
                    f"{key}"
                )

    def load_data(self, evaluates: bool = True) -> Source:
        """The source that `data` names. Raises DataError if a run with checkpoints would resume with other
        data, and, where the job `evaluates`, if its held-out problems cannot be read: before weights are
        loaded, and not when training is over."""
        config = self.config
        source = open_data(config.data, config.seed, self.folder.data, self.warn, config.screening)
        if self.rank == 0:
            kept, now = self.folder.source, {"hash": source.hash, "files": source.files}
            trains = not isinstance(self.stage, EvaluateConfig)  # an evaluation starts over
            if kept.exists() and checkpoints.holds_work(self.folder) and trains:
                check_data_unchanged(self.config.data.name, read_object(kept), now)
            write_json(kept, now)
        for line in source.layouts:
            self.show(say=f"data: {line}")
            log.info("data: %s", line)
        if evaluates and self.stage.eval.problems and not task_of(config.benchmark):
            source.prompts(self.stage.eval.split, 1, 0)
        self.data = source
        return source

    def note_memory(self, until: str) -> None:
        """The most that a rank has held so far; all ranks call."""
        self.memory_gb[until] = round(Ranks(self.config.engine).peak_memory() / 1e9, 3)

    def finish(
        self, checkpoint: Path, metrics: Metrics, samples: list[dict[str, Any]], data_hash: str | None = None
    ) -> None:
        """Write evaluation.json, samples.json and, last, record.json: its presence means done. `data_hash`:
        of the training data, if it is not the source's."""
        self.saved()
        self.note_memory("all")
        if self.rank != 0:
            return
        self.launch.check()
        write_json(self.folder.evaluation, metrics)
        write_json(self.folder.samples, samples)
        result: Result = {
            "wall_s": round(self.elapsed(), 3),
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "memory_gb": self.memory_gb,
            "steps": checkpoints.step_of(checkpoint),
            "data_hash": data_hash or self.data.hash,
            "metrics": metrics,
        }
        record = job_record(self.folder, self.config, checkpoint, self.chat, result, self.data.hash)
        with self.launch.saving():
            write_json(self.folder.record, record)
        log.info("done in %.0f s", self.elapsed())


@contextmanager
def open_run(path: Path | str, kind: type[S] = StageConfig) -> Iterator[Run[S]]:  # type: ignore[assignment]
    """Read config.json, set up threads, logging and signals; a user's error or a full disk becomes a line in
    error.txt and exit code 2."""
    folder = RunFolder(Path(path).resolve())
    try:
        rank = discover().rank
    except EnvironmentProblem as error:  # whose folder it is, is not clear either
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        config = with_relocated_parents(read_config(folder.config), folder.path.parent)
        shared = max(1, machine.cores() // config.engine.ranks)
        torch.set_num_threads(config.engine.threads or shared)
        if not isinstance(config.stage, kind):
            raise ConfigError(f"{folder.config} is for {config.stage.script}, not for {sys.argv[0]}")
        run = Run(folder, config, config.stage)
        log.info("%s: stage %s, rank %d of %d", folder.run_id, run.stage.name, run.rank, run.world_size)
        warnings = _ScreenHandler(run)
        log.addHandler(warnings)
        with stopping.listening(folder.stop, config.engine.grace_s), run.launch.beating(rank):
            try:
                yield run
            except stopping.Interrupted:
                run.saved()  # when the first rank leaves, the launcher ends the others
                Ranks(config.engine).barrier()
                raise
            finally:
                run.close()
                log.removeHandler(warnings)
                run.saved()
        exit_immediately_with(0)
    except stopping.Interrupted as interrupted:
        log.info("%s", interrupted)
        _exit(interrupted.exit_code)
    except locks.Taken as error:
        log.error("%s", error)
        _exit(locks.TAKEN_CODE)
    except R1pipeError as error:
        _fail(folder, str(error))
    except OSError as error:
        if not disk_is_full(error):
            raise
        _fail(folder, no_room(f"nothing can be written into {folder.run_id}", folder.path))


class _ScreenHandler(logging.Handler):
    """Shows rank 0's warnings on the screen."""

    def __init__(self, run: Resumable[Any]):
        super().__init__(logging.WARNING)
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self.run.show(say=record.getMessage())


def _exit(code: int) -> NoReturn:
    exit_immediately_with(code)
    raise SystemExit(code) from None


def _fail(folder: RunFolder, line: str) -> NoReturn:
    """End with one line for the user, in error.txt and in the log, and exit code 2."""
    try:
        record_error(folder.error, line)
    except OSError:  # the disk is full: progress.jsonl is expendable
        os.truncate(folder.progress, 0)
        folder.error.write_text(f"{line}\n", encoding="utf-8")
    log.error("%s", line)
    _exit(2)
