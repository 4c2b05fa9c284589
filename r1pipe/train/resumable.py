"""What a resumed run continues: its clock, its logs and its checkpoints. All ranks call; rank 0 writes."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import psutil
from safetensors import SafetensorError

from r1pipe.chat.template import Chat
from r1pipe.config import RunConfig, StageConfig
from r1pipe.core.errors import CheckpointError, ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder, content_dir
from r1pipe.model.saving import write_pretrained
from r1pipe.runs import checkpoints, heartbeat, locks, retention
from r1pipe.runs.files import append_line, cut_lines_after, cut_metrics_after, metric_lines, write_json
from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.writing import Writer
from r1pipe.train.saving import Saving, full_disk_message, raise_in_all_ranks, tables

NO_ENGINES: Mapping[str, Engine] = MappingProxyType({})

log = logging.getLogger("r1pipe")
S = TypeVar("S", bound=StageConfig)


class Saved(Protocol):
    """What a checkpoint has of it, for resume."""

    def save(self, folder: Path, state: dict[str, Any], writer: Writer) -> object:
        """All ranks call."""


class Resumable(Generic[S]):
    """The part of `Run` that a later session of the same run continues."""

    def __init__(self, folder: RunFolder, config: RunConfig, stage: S):
        self.folder, self.config, self.stage = folder, config, stage
        self.launch = locks.Launch(folder)
        place = discover()
        self.rank, self.world_size = place.rank, place.world_size
        self.seconds: dict[str, float] = {}  # by phase; over all sessions of a resumed run
        self._began = psutil.Process().create_time()  # imports count too
        self.saving = Saving(folder, self.launch, self._prune)

    # --- the clock

    def elapsed(self) -> float:
        """Seconds since the run began, including earlier sessions."""
        return time.time() - self._began

    @contextmanager
    def phase(self, name: str, metrics: dict[str, float] | None = None) -> Iterator[None]:
        """Add the time of a block to `seconds[name]` of the record, and to time/`name`_s of the metrics."""
        began = time.monotonic()
        with heartbeat.at(name):
            yield
        took = time.monotonic() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        if metrics is not None:
            metrics[f"time/{name}_s"] = metrics.get(f"time/{name}_s", 0.0) + took

    # --- logs

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        self._append(self.folder.metrics, {"step": step, "time": round(self.elapsed(), 3), **metrics})

    def logged(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far. Raises CheckpointError naming a damaged line."""
        return [row for _, row in metric_lines(self.folder.metrics)]

    def tripped(self, step: int, name: str, message: str) -> None:
        """One line of tripwires.jsonl, which MLflow shows as the likely cause, and a warning."""
        self._append(self.folder.tripwires, {"step": step, "name": name, "message": message})
        self.warn(f"step {step}: {message}")

    def note_dev(self, step: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """One line of dev_evaluations.jsonl, unless a session that was killed has left it."""
        if self.rank != 0:
            return
        path = self.folder.dev_evaluations
        lines = metric_lines(path, numbers_only=False) if path.exists() else []
        if all(row["step"] != step for _, row in lines):
            append_line(path, {"step": step, "metrics": metrics, "samples": samples})

    def warn(self, text: str) -> None:
        """One line on the screen and in the log."""
        log.warning("%s", text)

    def show(self, **row: Any) -> None:
        """One line of progress.jsonl, shown on the screen only."""
        self._append(self.folder.progress, {"time": round(self.elapsed(), 3), **row})

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self.rank == 0:
            append_line(path, row)

    def is_last(self, step: int, total: int, ranks: Ranks) -> bool:
        """Whether training ends with this logged step, at `total` or by early stopping; all ranks call."""
        name, patience = self.stage.keep_best, self.stage.early_stopping_patience
        if step >= total or name is None or not patience or not step:
            return step >= total
        direction = self.stage.keep_best_direction
        stalled = self.rank == 0 and retention.has_stalled(self.folder.metrics, name, direction, patience)
        if not ranks.agree_max(int(stalled)):
            return False
        log.info(
            "ends early, with step %d of %d: the last %d values of stage.keep_best=%s were no better than an "
            "earlier one (stage.early_stopping_patience)",
            *(step, total, patience, name),
        )
        return True

    # --- checkpoints

    def save_checkpoint(
        self,
        engine: Engine,
        step: int,
        state: dict[str, Any],
        export: Callable[[Any, Path], None] | None = None,
        others: Mapping[str, Saved] = NO_ENGINES,
        more: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """Write checkpoints/step-N: weights, tokenizer, state for resume; all ranks call.

        `state`: the loop's plain values, which `resume` returns. `export` writes the weights in another way,
        on rank 0 and from the whole model; `more` writes further files there. `others`: what else
        is saved for resume only, by name. With `engine.async_save` all but these two and a reference is
        written from copies, while training goes on (of the weights the last shard). Raises ConfigError, after
        saving, if `stage.keep_best` is no logged metric, and Taken if another launch has the run.
        """
        self.launch.check()
        target = self.folder.checkpoint(step)
        unfinished = checkpoints.unfinished(target)
        writer = Writer(unfinished, self.config.engine.async_save)
        with self.phase("saving"):
            problem = self.saving.wait()
            with engine.gathered() if export else nullcontext() as model:
                tensors = iter(()) if export else engine.tensors()
                if self.rank == 0 and problem is None:
                    own = tensors if engine.in_step else writer.copies_of(tensors)  # gathered ones are copies
                    ours = partial(write_pretrained, engine.module, own, later=writer.add)
                    problem = self._publish(target, partial(export, model) if export else ours, more)
                for _ in tensors if engine.in_step else ():  # all gather, also what could not be written
                    pass
            raise_in_all_ranks(engine, problem, EnvironmentProblem, target)
            clock = {"elapsed": self.elapsed(), "seconds": self.seconds}
            place = unfinished / checkpoints.ENGINE
            engine.save(place, {"step": step, "loop": state, **clock}, writer)
            for name, other in others.items():
                other.save(place / name, {}, writer)
            timeline = engine.timeline()
            if timeline and self.rank == 0:
                write_json(self.folder.timeline, timeline, indent=None)
            writer.all_copied()
            raise_in_all_ranks(engine, writer.problem, EnvironmentProblem, target)
            # its thread may outlive the engine, which it is not to keep
            self.saving.begin(Ranks(self.config.engine), target, step, writer)
            if self.stage.keep_best is not None:
                if self.rank == 0:
                    problem = retention.unknown_best(self.folder.metrics, self.stage, step)
                raise_in_all_ranks(engine, problem, ConfigError)
        return target

    def check_saved(self, ranks: Ranks) -> None:
        """At a point that all ranks reach: raises EnvironmentProblem in all of them if the last checkpoint
        could not be written. Does not wait for it."""
        self.saving.check(ranks)

    def saved(self) -> None:
        """Wait until the last checkpoint is in place. Raises EnvironmentProblem if the disk was full."""
        with self.phase("saving"):
            problem = self.saving.wait()
        if problem is not None:
            raise EnvironmentProblem(problem)

    def _publish(
        self, target: Path, write: Callable[[Path], None], more: Callable[[Path], None]
    ) -> str | None:
        """`write` weights, tokenizer, sampling settings and `more`; returns a message if the disk is full."""
        try:
            temporary, source = checkpoints.begin(target), self._tokenizer_folder()
            write(temporary)
            more(temporary)
            chat, sampling = Chat.load(source, self.config.chat.system), self.stage.eval
            chat.save(source, temporary)
            generation = {
                "bos_token_id": chat.bos_id,
                "eos_token_id": chat.eos_id if len(chat.eos_ids) == 1 else list(chat.eos_ids),
                "pad_token_id": chat.pad_id,
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
            write_json(temporary / "generation_config.json", generation)
        except (OSError, RuntimeError, SafetensorError) as error:
            checkpoints.abandon(target)
            return full_disk_message(error, target)
        return None

    def _prune(self) -> None:
        stage = self.stage
        best_by = (stage.keep_best, stage.keep_best_direction) if stage.keep_best else None
        retention.prune(self.folder, stage.keep, best_by)

    def newest_complete(self, ranks: Ranks) -> Path | None:
        """The newest undamaged checkpoint, None if there never was one; newer ones are reported and renamed.
        All ranks call. Raises CheckpointError if all are damaged."""
        step, damaged = checkpoints.newest_complete(self.folder.checkpoints, ranks)
        if self.rank == 0:
            for line in damaged:
                self.warn(f"{line}; resumes from step {step} instead")
            if step is not None:
                checkpoints.remove_after(self.folder.checkpoints, step)
        ranks.barrier()
        return None if step is None else self.folder.checkpoint(step)

    def resume(self, engine: Engine, others: Mapping[str, Engine] = NO_ENGINES) -> tuple[int, dict[str, Any]]:
        """Load the newest undamaged checkpoint, and remove later metrics, trips and rollouts; returns its
        step and loop state, or (0, {}). Raises CheckpointError if the metrics up to it are damaged."""
        folder = self.newest_complete(engine)
        step, loop = 0, {}
        if folder is not None:
            scratch = self.folder.checkpoints
            state = engine.load(folder / checkpoints.ENGINE, scratch)
            for name, other in others.items():
                other.load(folder / checkpoints.ENGINE / name, scratch)
            step, loop, self.seconds = state["step"], state["loop"], state["seconds"]
            self._began -= state["elapsed"]
            log.info("resumes from step %d (%s)", step, folder)
        problem = None
        if self.rank == 0:
            try:
                cut_metrics_after(self.folder.metrics, step)
                cut_lines_after(self.folder.tripwires, step)
                cut_lines_after(self.folder.dev_evaluations, step)
            except CheckpointError as error:
                problem = str(error)
            else:
                for table in tables(self.folder, step + 1):
                    table.unlink()
                self.saving.durable = step
                self._prune()  # a kill may have prevented it after the last save
        raise_in_all_ranks(engine, problem, CheckpointError)  # before any rank reads the lines
        return step, loop

    def _tokenizer_folder(self) -> Path:
        parent = self.config.weights_from
        return Path(parent.checkpoint) if parent else content_dir() / "tokenizer"
