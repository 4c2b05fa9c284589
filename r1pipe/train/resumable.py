"""What of a run outlasts an interruption: its clock, its lines and its checkpoints.

All ranks call; rank 0 writes.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import psutil
from safetensors import SafetensorError

from r1pipe.chat.template import TOKENIZER_FILES, Chat
from r1pipe.config import ParentRef, RunConfig, StageConfig
from r1pipe.core.errors import CheckpointError, ConfigError, EnvironmentProblem, disk_is_full, no_room
from r1pipe.core.paths import RunFolder, content_dir
from r1pipe.model import save_pretrained
from r1pipe.runs import checkpoints, heartbeat, retention
from r1pipe.runs.files import append_line, cut_metrics_after, cut_tripwires_after, metric_lines, write_json
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks, rank_and_world

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
        self._beside = ThreadPoolExecutor(1)  # finishes a checkpoint while training goes on
        self._finishing: Future[str | None] | None = None
        self._durable = 0  # the step up to which tables of rollouts are on the disk itself

    # --- the clock

    def elapsed(self) -> float:
        """Seconds since the run began, those before an interruption included."""
        return time.time() - self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block under `seconds[name]` of the record; it shows work (runs.heartbeat)."""
        began = time.monotonic()
        with heartbeat.at(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    # --- its lines

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        self._append(self.folder.metrics, {"step": step, "time": round(self.elapsed(), 3), **metrics})

    def logged(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far. Raises CheckpointError naming the line that is none."""
        return [row for _, row in metric_lines(self.folder.metrics)]

    def tripped(self, step: int, name: str, message: str) -> None:
        """One line of tripwires.jsonl, from which MLflow has the likely cause, and for whoever watches."""
        self._append(self.folder.tripwires, {"step": step, "name": name, "message": message})
        self.warn(f"step {step}: {message}")

    def warn(self, text: str) -> None:
        """One line for whoever watches, on the screen and in the log."""
        log.warning("%s", text)

    def tell(self, **row: Any) -> None:
        """One line of progress.jsonl, for the screen alone."""
        self._append(self.folder.progress, {"time": round(self.elapsed(), 3), **row})

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self.rank == 0:
            append_line(path, row)

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
        that are needed for resume alone, by a name each. Raises ConfigError, with the checkpoint in place,
        where `stage.keep_best` names no metric.
        """
        target = self.folder.checkpoint(step)
        with self.phase("saving"):
            problem = self._last_problem()
            with engine.gathered() as model:
                if self.rank == 0 and problem is None:
                    problem = self._export(export, model, target)
            self._all_or_none(engine, problem, target)
            clock = {"elapsed": self.elapsed(), "seconds": self.seconds}
            place = checkpoints.unfinished(target) / checkpoints.ENGINE
            problems = [engine.save(place, {"step": step, "loop": state, **clock})]
            problems += [other.save(place / name, {}) for name, other in beside.items()]
            self._all_or_none(engine, next(filter(None, problems), None), target)
            if self.rank == 0:
                self._finishing = self._beside.submit(self._finish, target, step)
            self._check_best_metric(engine, step)
        return target

    def _check_best_metric(self, ranks: Ranks, step: int) -> None:
        """Raises ConfigError in all ranks where `stage.keep_best` is nothing that this run logs."""
        if self.stage.keep_best is None:
            return
        problem = retention.unknown_best(self.folder.metrics, self.stage, step) if self.rank == 0 else None
        problem = ranks.all_gather_objects(problem)[0]
        if problem is not None:
            raise ConfigError(problem)

    def saved(self) -> None:
        """Wait until the last checkpoint is in place. Raises EnvironmentProblem where the disk was full."""
        with self.phase("saving"):
            problem = self._last_problem()
        if problem is not None:
            raise EnvironmentProblem(problem)

    def _export(self, export: Callable[[Any, Path], None], model: Any, target: Path) -> str | None:
        """Write what the checkpoint publishes; what to tell the user where the disk is full."""
        try:
            temporary = checkpoints.begin(target)
            export(model, temporary)
            self._add_tokenizer(temporary)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library's own for a full disk
            return self._told(error, target)
        return None

    def _finish(self, target: Path, step: int) -> str | None:
        """In a thread of rank 0, while training goes on: hash, make durable, put in place, let older ones go.

        Lines and tables of the steps so far are made durable first: they would not come again.
        """
        try:
            for lines in filter(Path.exists, (self.folder.metrics, self.folder.tripwires)):
                checkpoints.sync(lines)
            for table in self._tables(self._durable + 1, step):
                checkpoints.sync(table)
            self._durable = step
            checkpoints.finish(target)
        except OSError as error:
            return self._told(error, target)
        self._prune()
        return None

    def _prune(self) -> None:
        stage = self.stage
        best_by = (stage.keep_best, stage.keep_best_direction) if stage.keep_best else None
        retention.prune(self.folder, stage.keep, best_by)

    def _told(self, error: Exception, target: Path) -> str:
        """What to tell the user of a full disk, on which nothing unfinished is left; other errors go on."""
        checkpoints.abandon(target)
        if not disk_is_full(error):
            raise error
        return no_room(f"{target.name} was not saved", self.folder.checkpoints)

    def _last_problem(self) -> str | None:
        """What came of the last checkpoint, once it is done; what goes wrong in the thread is raised here."""
        finishing, self._finishing = self._finishing, None
        return finishing.result() if finishing else None

    def _all_or_none(self, ranks: Ranks, problem: str | None, target: Path) -> None:
        """Raises EnvironmentProblem on all ranks where one could not write, with nothing left of it."""
        told = [one for one in ranks.all_gather_objects(problem) if one is not None]
        if told:
            if self.rank == 0:
                checkpoints.abandon(target)
            raise EnvironmentProblem(told[0])

    def adopt_checkpoint(self, parent: ParentRef) -> Path:
        """Copy what a parent publishes to checkpoints/step-0; rank 0 does it."""
        target = self.folder.checkpoint(0)
        if self.rank == 0:
            checkpoints.verify(parent.checkpoint, parent.hash)
            temporary = checkpoints.begin(target)
            checkpoints.copy_published(Path(parent.checkpoint), temporary)
            checkpoints.finish(target)
        return target

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
        write_json(folder / "generation_config.json", generation)

    def newest_complete(self, ranks: Ranks) -> Path | None:
        """The newest checkpoint whose files are all what was saved, None where there never was one; all ranks
        call.

        What is wrong with newer ones is told in a line each, and they are set aside. Raises CheckpointError
        where there are checkpoints and none is whole.
        """
        step, problem = None, None
        if self.rank == 0:
            try:
                step, wrong = checkpoints.newest_complete(self.folder.checkpoints)
            except CheckpointError as error:
                problem = str(error)
            else:
                for line in wrong:
                    self.warn(f"{line}; goes on from step {step} instead")
                if step is not None:
                    checkpoints.remove_after(self.folder.checkpoints, step)
        step, problem = ranks.all_gather_objects((step, problem))[0]
        if problem is not None:
            raise CheckpointError(problem)
        return None if step is None else self.folder.checkpoint(step)

    def resume(self, engine: Engine, beside: Mapping[str, Engine] = NO_ENGINES) -> tuple[int, dict[str, Any]]:
        """Put the newest whole checkpoint back; its step and loop state, or (0, {}) where there is none.

        Metrics, trips and rollouts after that step are cut off: they will come again. Raises CheckpointError
        where the metrics up to it are not whole.
        """
        folder = self.newest_complete(engine)
        step, loop = 0, {}
        if folder is not None:
            scratch = self.folder.checkpoints
            state = engine.load(folder / checkpoints.ENGINE, scratch)
            for name, other in beside.items():
                other.load(folder / checkpoints.ENGINE / name, scratch)
            step, loop, self.seconds = state["step"], state["loop"], state["seconds"]
            self._began -= state["elapsed"]
            log.info("goes on from step %d (%s)", step, folder)
        problem = self._cut_back(step) if self.rank == 0 else None
        # other ranks read the lines, too, and a kill may have cut the last one off
        problem = engine.all_gather_objects(problem)[0]
        if problem is not None:
            raise CheckpointError(problem)
        return step, loop

    def _cut_back(self, step: int) -> str | None:
        """Rank 0: leave of lines, tables and older checkpoints what belongs to a step; what is wrong."""
        try:
            cut_metrics_after(self.folder.metrics, step)
            cut_tripwires_after(self.folder.tripwires, step)
        except CheckpointError as error:
            return str(error)
        for table in self._tables(step + 1):
            table.unlink()
        self._durable = step
        self._prune()  # a kill may have come between a save and this
        return None

    def _tables(self, first: int, last: float = math.inf) -> list[Path]:
        """The tables of rollouts of some steps."""
        there = self.folder.rollouts.glob("step-*.parquet")
        return [path for path in there if first <= int(path.stem.removeprefix("step-")) <= last]

    def _tokenizer_folder(self) -> Path:
        parent = self.config.weights_from
        return Path(parent.checkpoint) if parent else content_dir() / "tokenizer"
