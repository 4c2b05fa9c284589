"""One job's run folder: config in; metrics, progress, checkpoints and the record out.

`with open_run(folder) as run:` is the frame of every stage script. Rank 0 writes; all ranks call.
"""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from r1pipe.chat.template import Chat
from r1pipe.config import EvaluateConfig, ParentRef, RunConfig, StageConfig, read_config
from r1pipe.core.errors import CheckpointError, ConfigError, R1pipeError, disk_is_full, no_room, warn_once
from r1pipe.core.paths import RunFolder
from r1pipe.data.opening import open_data
from r1pipe.data.source import Source, check_data_unchanged
from r1pipe.model import DeepseekV3, load_pretrained
from r1pipe.runs import checkpoints, heartbeat, locks, machine
from r1pipe.runs.jsonfile import read_object
from r1pipe.runs.lineage.fit import check_parent_fits
from r1pipe.runs.lineage.moved import with_present_parents
from r1pipe.runs.provenance import job_record, write_json
from r1pipe.runs.record import Metrics, Result
from r1pipe.runs.stopping import Interrupted, listening
from r1pipe.train.engine.ranks import Ranks, exit_immediately_with, rank_and_world
from r1pipe.train.resumable import Resumable

PROGRESS_EVERY_S = 0.25  # seconds between progress lines of the same kind

log = logging.getLogger("r1pipe")
S = TypeVar("S", bound=StageConfig)


class Run(Resumable[S]):
    """What a stage script needs of its run folder. Made by `open_run`."""

    def __init__(self, folder: RunFolder, config: RunConfig, stage: S):
        super().__init__(folder, config, stage)
        self._progressed: dict[str, float] = {}
        for place in (folder.checkpoints, folder.data):
            place.mkdir(parents=True, exist_ok=True)
        self.seconds["starting"] = self.elapsed()

    # --- randomness: named, seeded streams, never the global one

    def seed(self, stream: str, step: int = 0) -> int:
        """A seed of 63 bits that depends on the run's seed, the stream's name and the step alone."""
        digest = hashlib.sha256(f"{self.config.seed}/{stream}/{step}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def rng(self, stream: str, step: int = 0) -> np.random.Generator:
        return np.random.default_rng(self.seed(stream, step))

    def generator(self, stream: str, step: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(stream, step))

    # --- what is shown while it runs

    def progress(self, what: str, done: int, total: int, unit: str, **show: float) -> None:
        """Say how far a piece of work is; cheap enough to call in every round of a loop."""
        now = time.monotonic()
        if done < total and now - self._progressed.get(what, 0.0) < PROGRESS_EVERY_S:
            return
        self._progressed[what] = now
        self.tell(what=what, done=done, total=total, unit=unit, show=show)

    # --- what it starts from

    def load_model(self, parent: ParentRef | None) -> DeepseekV3:
        """The parent's model, its files checked against their hashes; without a parent random weights."""
        with heartbeat.at("loading weights", patient=parent is None):
            if parent is None:
                return DeepseekV3(self.config.model, self.generator("weights"))
            if self.rank == 0:
                checkpoints.verify(parent.checkpoint, parent.hash)
            if parent == self.config.weights_from:
                check_parent_fits(parent, self.config.model)
            return load_pretrained(parent.checkpoint)

    def load_chat(self) -> Chat:
        """The tokenizer and chat template that came with the weights.

        Raises CheckpointError where a checkpoint that is read besides speaks another format.
        """
        chat = Chat.load(self._tokenizer_folder())
        for stage, parent in self.config.reads_from.items():
            other = Chat.load(parent.checkpoint)
            if (other.template_hash, other.tokenizer_hash) != (chat.template_hash, chat.tokenizer_hash):
                raise CheckpointError(
                    f"{parent.checkpoint} (stage {stage}) has another tokenizer or chat template than "
                    f"{self._tokenizer_folder()}; take both from one pipeline"
                )
        return chat

    def load_data(self) -> Source:
        """The source that `data` names. Rank 0 keeps what it was when the run began.

        Raises DataError where a run that has made something would go on with other data.
        """
        source = open_data(self.config.data, self.config.seed, self.folder.data, self.warn)
        if self.rank == 0:
            kept, now = self.folder.source, {"hash": source.hash, "files": source.files}
            measures_only = isinstance(self.stage, EvaluateConfig)  # and all of it anew
            if kept.exists() and checkpoints.holds_work(self.folder) and not measures_only:
                check_data_unchanged(self.config.data.name, read_object(kept), now)
            write_json(kept, now)
        return source

    # --- the end

    def finish(
        self,
        checkpoint: Path,
        chat: Chat,
        evaluation: Metrics,
        samples: list[dict[str, Any]],
        data_hash: str | None,
        steps: int,
        source_hash: str | None = None,
    ) -> None:
        """Write evaluation.json, samples.json and, last, record.json: its presence means done.

        `data_hash` is that of what was trained on, `source_hash` that of the data source where it is another.
        """
        self.saved()
        if self.rank != 0:
            return
        write_json(self.folder.evaluation, evaluation)
        write_json(self.folder.samples, samples)
        wall_s, seconds = round(self.elapsed(), 3), {k: round(v, 3) for k, v in self.seconds.items()}
        result: Result = {
            "wall_s": wall_s,
            "seconds": seconds,
            "steps": steps,
            "data_hash": data_hash,
            "metrics": evaluation,
        }
        source_hash = source_hash or data_hash
        record = job_record(self.folder, self.config, checkpoint, chat, result, source_hash)
        write_json(self.folder.record, record)
        log.info("done in %.0f s", self.elapsed())


@contextmanager
def open_run(path: Path | str, kind: type[S] = StageConfig) -> Iterator[Run[S]]:  # type: ignore[assignment]
    """The frame of a stage script: reads config.json, sets threads and logging, and turns a user's error into
    one line of error.txt and exit code 2; a full disk is one too."""
    folder = RunFolder(Path(path).resolve())
    rank, _ = rank_and_world()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        config = with_present_parents(read_config(folder.config), folder.path.parent)
        torch.set_num_threads(_threads(config))
        if not isinstance(config.stage, kind):
            raise ConfigError(f"{folder.config} is for {config.stage.script}, not for {sys.argv[0]}")
        run = Run(folder, config, config.stage)
        log.info("%s: stage %s, rank %d of %d", folder.run_id, run.stage.name, run.rank, run.world_size)
        warnings = _OnScreen(run)
        log.addHandler(warnings)
        beating = locks.beating(folder, rank, launched_here=config.engine.hostfile is None)
        with listening(folder.stop, config.engine.grace_s), beating:
            try:
                yield run
            except Interrupted:
                run.saved()  # when the first rank leaves, the launcher ends the others
                Ranks(config.engine).barrier()
                raise
            finally:
                log.removeHandler(warnings)
                run.saved()
        exit_immediately_with(0)
    except Interrupted as interrupted:
        log.info("%s", interrupted)
        exit_immediately_with(interrupted.exit_code)
        raise SystemExit(interrupted.exit_code) from None
    except locks.Taken as error:
        log.error("%s", error)
        exit_immediately_with(2)
        raise SystemExit(2) from None
    except R1pipeError as error:
        _leave(folder, str(error))
    except OSError as error:
        if not disk_is_full(error):
            raise
        _leave(folder, no_room(f"nothing can be written into {folder.run_id}", folder.path))


class _OnScreen(logging.Handler):
    """Shows every room's warnings to whoever watches; rank 0's, as all that is written."""

    def __init__(self, run: Resumable[Any]):
        super().__init__(logging.WARNING)
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self.run.tell(say=record.getMessage())


def _leave(folder: RunFolder, line: str) -> NoReturn:
    """End with one line for the user, in error.txt and in the log, and exit code 2."""
    try:
        warn_once(folder.error, line)
    except OSError:  # the disk is full: what only the screen showed makes room
        os.truncate(folder.progress, 0)
        folder.error.write_text(f"{line}\n", encoding="utf-8")
    log.error("%s", line)
    exit_immediately_with(2)
    raise SystemExit(2) from None


def _threads(config: RunConfig) -> int:
    """CPU threads of this rank: as configured, or the cores divided by the ranks."""
    return config.engine.threads or max(1, machine.cores() // config.engine.ranks)
