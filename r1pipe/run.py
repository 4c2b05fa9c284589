"""One job's run folder: config in; metrics, progress, checkpoints and the record out.

`with open_run(folder) as run:` is the frame of every stage script. Rank 0 writes; all ranks call.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np
import psutil
import torch

from r1pipe import checkpoints
from r1pipe.config import read_config
from r1pipe.config.schema import ParentRef, RunConfig, StageConfig
from r1pipe.data.chat import TOKENIZER_FILES, Chat
from r1pipe.engine import Engine
from r1pipe.errors import CheckpointError, ConfigError, R1pipeError
from r1pipe.lineage.fit import must_fit
from r1pipe.model import DeepseekV3, load_pretrained, save_pretrained
from r1pipe.paths import RunFolder, content_dir
from r1pipe.provenance import job_record, write_json
from r1pipe.ranks import leave_with, rank_and_world

NO_ENGINES: Mapping[str, Engine] = MappingProxyType({})
PROGRESS_EVERY_S = 0.25  # seconds between progress lines of the same kind

log = logging.getLogger("r1pipe")
S = TypeVar("S", bound=StageConfig)


class Run(Generic[S]):
    """What a stage script needs of its run folder. Made by `open_run`."""

    def __init__(self, folder: RunFolder, config: RunConfig, stage: S):
        self.folder, self.config, self.stage = folder, config, stage
        self.rank, self.world_size = rank_and_world()
        self.seconds: dict[str, float] = {}  # by phase; over all sessions of a resumed run
        self._began = psutil.Process().create_time()  # imports count too
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

    def elapsed(self) -> float:
        """Seconds since the run began, those before an interruption included."""
        return time.time() - self._began

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        self._append(self.folder.metrics, {"step": step, "time": round(self.elapsed(), 3), **metrics})

    def logged(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far."""
        return [json.loads(line) for line in self.folder.metrics.read_text(encoding="utf-8").splitlines()]

    def progress(self, what: str, done: int, total: int, unit: str, **show: float) -> None:
        """Say how far a piece of work is; cheap enough to call in every round of a loop."""
        now = time.monotonic()
        if done < total and now - self._progressed.get(what, 0.0) < PROGRESS_EVERY_S:
            return
        self._progressed[what] = now
        row = {"what": what, "done": done, "total": total, "unit": unit, "show": show}
        self._append(self.folder.progress, {"time": round(self.elapsed(), 3), **row})

    def warn(self, text: str) -> None:
        """One line for whoever watches, on the screen and in the log."""
        log.warning("%s", text)
        self._append(self.folder.progress, {"time": round(self.elapsed(), 3), "say": text})

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self.rank == 0:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block under `seconds[name]` of the record."""
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    # --- what it starts from

    def load_model(self, parent: ParentRef | None) -> DeepseekV3:
        """The parent's model, its files checked against their hashes; without a parent random weights."""
        if parent is None:
            return DeepseekV3(self.config.model, self.generator("weights"))
        if self.rank == 0:
            checkpoints.verify(parent.checkpoint, parent.hash)
        if parent == self.config.weights_from:
            must_fit(parent, self.config.model)
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

    def _tokenizer_folder(self) -> Path:
        parent = self.config.weights_from
        return Path(parent.checkpoint) if parent else content_dir() / "tokenizer"

    # --- checkpoints

    def save_checkpoint(
        self,
        engine: Engine,
        step: int,
        state: dict[str, Any],
        export: Callable[[Any, Path], None] = save_pretrained,
        beside: Mapping[str, Engine] = NO_ENGINES,
    ) -> Path:
        """Write checkpoints/step-N: weights by `export`, tokenizer, the state for resume; all ranks call.

        `state` is what the loop must remember, plain values; `resume` gives it back. `beside` are engines
        that are needed for resume alone, by a name each.
        """
        target = self.folder.checkpoint(step)
        with self.phase("saving"):
            with engine.gathered() as model:
                if self.rank == 0:
                    temporary = checkpoints.begin(target)
                    export(model, temporary)
                    self._add_tokenizer(temporary)
            clock = {"elapsed": self.elapsed(), "seconds": self.seconds}
            engine.save(
                checkpoints.unfinished(target) / checkpoints.ENGINE, {"step": step, "loop": state, **clock}
            )
            for name, other in beside.items():
                other.save(checkpoints.unfinished(target) / checkpoints.ENGINE / name, {})
            self._put_in_place(target)
            engine.barrier()
        return target

    def adopt_checkpoint(self, parent: ParentRef) -> Path:
        """Copy what a parent publishes to checkpoints/step-0; rank 0 does it."""
        target = self.folder.checkpoint(0)
        if self.rank == 0:
            checkpoints.verify(parent.checkpoint, parent.hash)
            temporary = checkpoints.begin(target)
            checkpoints.copy_published(Path(parent.checkpoint), temporary)
            self._put_in_place(target)
        return target

    def _put_in_place(self, target: Path) -> None:
        if self.rank == 0:
            checkpoints.finish(target)
            checkpoints.prune(self.folder.checkpoints, self.stage.keep)

    def _add_tokenizer(self, folder: Path) -> None:
        """The chat format travels with the weights, and so does how to sample from them."""
        source = self._tokenizer_folder()
        for name in TOKENIZER_FILES:
            copyfile(source / name, folder / name)
        chat, sampling = Chat.load(source), self.stage.eval
        generation = {
            "bos_token_id": chat.bos_id,
            "eos_token_id": chat.eos_id,
            "pad_token_id": chat.pad_id,
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        (folder / "generation_config.json").write_text(
            json.dumps(generation, indent=1) + "\n", encoding="utf-8"
        )

    def resume(self, engine: Engine, beside: Mapping[str, Engine] = NO_ENGINES) -> tuple[int, dict[str, Any]]:
        """Put the newest whole checkpoint back; its step and loop state, or (0, {}) where there is none.

        Metrics after that step are cut off: they will come again.
        """
        saved = checkpoints.steps(self.folder.checkpoints)
        step, loop = 0, {}
        if saved:
            folder = self.folder.checkpoint(saved[-1])
            if self.rank == 0:
                checkpoints.verify(folder, engine=True)
            state = engine.load(folder / checkpoints.ENGINE)
            for name, other in beside.items():
                other.load(folder / checkpoints.ENGINE / name)
            step, loop, self.seconds = state["step"], state["loop"], state["seconds"]
            self._began -= state["elapsed"]
            log.info("goes on from step %d (%s)", step, folder)
        if self.rank == 0 and self.folder.metrics.exists():
            _cut_after(self.folder.metrics, step)
        return step, loop

    # --- the end

    def finish(
        self,
        checkpoint: Path,
        chat: Chat,
        evaluation: dict[str, Any],
        samples: list[dict[str, Any]],
        data_hash: str | None,
        steps: int,
    ) -> None:
        """Write evaluation.json, samples.json and, last, record.json: its presence means done."""
        if self.rank != 0:
            return
        write_json(self.folder.evaluation, evaluation)
        write_json(self.folder.samples, samples)
        wall_s, seconds = round(self.elapsed(), 3), {k: round(v, 3) for k, v in self.seconds.items()}
        made = {
            "wall_s": wall_s,
            "seconds": seconds,
            "steps": steps,
            "data_hash": data_hash,
            "metrics": evaluation,
        }
        write_json(self.folder.record, job_record(self.folder, self.config, checkpoint, chat, made))
        log.info("done in %.0f s", self.elapsed())


@contextmanager
def open_run(path: Path | str, kind: type[S] = StageConfig) -> Iterator[Run[S]]:  # type: ignore[assignment]
    """The frame of a stage script: reads config.json, sets threads and logging, and turns a user's error into
    one line of error.txt and exit code 2."""
    folder = RunFolder(Path(path).resolve())
    rank, _ = rank_and_world()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        config = read_config(folder.config)
        torch.set_num_threads(_threads(config))
        if not isinstance(config.stage, kind):
            raise ConfigError(f"{folder.config} is for {config.stage.script}, not for {sys.argv[0]}")
        run = Run(folder, config, config.stage)
        log.info("%s: stage %s, rank %d of %d", folder.run_id, run.stage.name, run.rank, run.world_size)
        yield run
        leave_with(0)
    except R1pipeError as error:
        log.error("%s", error)
        _first_writes(folder.error, f"{error}\n")
        leave_with(2)
        raise SystemExit(2) from None


def _threads(config: RunConfig) -> int:
    """CPU threads of this rank: as configured, or the cores divided by the ranks."""
    return config.engine.threads or max(1, len(os.sched_getaffinity(0)) // config.engine.ranks)


def _first_writes(path: Path, text: str) -> None:
    """Ranks may fail together, and a rank other than 0 alone: the first one tells."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        pass


def _cut_after(metrics: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that was cut off by a kill."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    temporary = metrics.with_suffix(".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(metrics)
