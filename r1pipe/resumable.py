"""What of a run outlasts an interruption: its clock, its lines and its checkpoints.

All ranks call; rank 0 writes.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import psutil

from r1pipe import checkpoints
from r1pipe.config.schema import ParentRef, RunConfig, StageConfig
from r1pipe.data.chat import TOKENIZER_FILES, Chat
from r1pipe.engine import Engine
from r1pipe.model import save_pretrained
from r1pipe.paths import RunFolder, content_dir
from r1pipe.ranks import rank_and_world

NO_ENGINES: Mapping[str, Engine] = MappingProxyType({})

log = logging.getLogger("r1pipe")
S = TypeVar("S", bound=StageConfig)


class Resumable(Generic[S]):
    """The part of `Run` that a later session of the same run takes up."""

    def __init__(self, folder: RunFolder, config: RunConfig, stage: S):
        self.folder, self.config, self.stage = folder, config, stage
        self.rank, self.world_size = rank_and_world()
        self.seconds: dict[str, float] = {}  # by phase; over all sessions of a resumed run
        self._began = psutil.Process().create_time()  # imports count too

    # --- the clock

    def elapsed(self) -> float:
        """Seconds since the run began, those before an interruption included."""
        return time.time() - self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block under `seconds[name]` of the record."""
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    # --- its lines

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        self._append(self.folder.metrics, {"step": step, "time": round(self.elapsed(), 3), **metrics})

    def logged(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far."""
        return [json.loads(line) for line in self.folder.metrics.read_text(encoding="utf-8").splitlines()]

    def warn(self, text: str) -> None:
        """One line for whoever watches, on the screen and in the log."""
        log.warning("%s", text)
        self.tell(say=text)

    def tell(self, **row: Any) -> None:
        """One line of progress.jsonl, for the screen alone."""
        self._append(self.folder.progress, {"time": round(self.elapsed(), 3), **row})

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self.rank == 0:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

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
            for file in Path(parent.checkpoint).iterdir():
                if file.is_file() and file.name != checkpoints.MANIFEST:
                    copyfile(file, temporary / file.name)
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

    def _tokenizer_folder(self) -> Path:
        parent = self.config.weights_from
        return Path(parent.checkpoint) if parent else content_dir() / "tokenizer"


def _cut_after(metrics: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that was cut off by a kill."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    temporary = metrics.with_suffix(".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(metrics)
