"""Completes checkpoints in a thread of each rank, one at a time, while training goes on.

Every rank writes what it has copied and hashes what it wrote; then rank 0 lists all hashes, syncs and
renames: until that the checkpoint is not there. How it went, ranks ask together at the end of each step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from r1pipe.core.errors import EnvironmentProblem, R1pipeError, disk_is_full, no_room
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints, heartbeat, locks
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.writing import Writer

DONE, WRITES, FAILED = range(3)  # a rank's part of a checkpoint; ranks agree on the greatest


class Saving:
    """The checkpoints of a run on one rank; `prune` removes older ones."""

    def __init__(self, folder: RunFolder, launch: locks.Launch, prune: Callable[[], None]):
        self.folder, self.launch, self.prune = folder, launch, prune
        self.durable = 0  # rollout tables up to this step are synced to disk
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[str | None] | None = None  # the same checkpoint on all ranks

    def begin(self, ranks: Ranks, target: Path, step: int, writer: Writer) -> None:
        """Complete the checkpoint `target` from now on; all ranks call, when the one before is done."""
        written = ranks.all_gather_objects(writer.paths)
        self._running = self._thread.submit(self._finish, ranks, target, step, writer, written)

    def wait(self) -> str | None:
        """Wait for this rank's thread; returns a message if the disk was full, or raises its error."""
        running, self._running = self._running, None
        return running.result() if running else None

    def check(self, ranks: Ranks) -> None:
        """At a point that all ranks reach: raises EnvironmentProblem in all of them if the last checkpoint
        could not be written. Does not wait for it."""
        if self._running is None:
            return
        done = self._running.done()
        problem = self._running.result() if done else None
        state = ranks.agree_max(FAILED if problem is not None else DONE if done else WRITES)
        if state == FAILED:
            raise_in_all_ranks(ranks, problem, EnvironmentProblem)
        if state == DONE:
            self._running = None

    def _finish(
        self, ranks: Ranks, target: Path, step: int, writer: Writer, written: Sequence[Sequence[Path]]
    ) -> str | None:
        """In the thread: this rank's part, then, on rank 0, what completes the checkpoint. `written`: the
        files of each rank's part; rank 0 has all others, too."""
        hashes: dict[str, str] = {}
        try:
            writer.write_copies()
            problem = writer.problem
            if problem is None:
                others: Iterable[Path] = (path for paths in written[1:] for path in paths)
                own = checkpoints.files_in(writer.folder).difference(others)
                hashes = checkpoints.seal(writer.folder, own if ranks.rank == 0 else writer.paths)
        except (OSError, RuntimeError, SafetensorError) as error:
            problem = full_disk_message(error, target)
        with heartbeat.limited():  # another rank may have more to write
            parts = ranks.gather_beside((problem, hashes))
        problem = next((each for each, _ in parts if each is not None), None)
        if ranks.rank != 0:
            return problem
        if problem is None:
            sealed = {name: sha for _, part in parts for name, sha in part.items()}
            problem = self._complete(target, step, sealed)
        if problem is not None:
            checkpoints.abandon(target)
            return problem
        self.prune()
        return None

    def _complete(self, target: Path, step: int, hashes: checkpoints.Hashes) -> str | None:
        """Sync, and rename into place; returns a message if the disk is full. Logs and tables of the steps so
        far come first, as a resumed run does not write them again."""
        try:
            logs = self.folder.metrics, self.folder.tripwires, self.folder.dev_evaluations
            for lines in filter(Path.exists, logs):
                checkpoints.sync(lines)
            for table in tables(self.folder, self.durable + 1, step):
                checkpoints.sync(table)
            self.durable = step
            checkpoints.finish(target, self.launch.saving(), hashes)
        except OSError as error:
            return full_disk_message(error, target)
        return None


def tables(folder: RunFolder, first: int, last: float = math.inf) -> list[Path]:
    """The rollout tables of steps first to last."""
    found = folder.rollouts.glob("step-*.parquet")
    return [path for path in found if first <= int(path.stem.removeprefix("step-")) <= last]


def full_disk_message(error: Exception, target: Path) -> str:
    """Each library has an error of its own for a full disk. Raises `error` if it is not that."""
    if not disk_is_full(error):
        raise error
    return no_room(f"{target.name} was not saved", target.parent)


def raise_in_all_ranks(
    ranks: Ranks, problem: str | None, error: type[R1pipeError], unfinished: Path | None = None
) -> None:
    """Raise `error` in all ranks if one has a problem, after removing the checkpoint `unfinished`."""
    problems = [text for text in ranks.all_gather_objects(problem) if text is not None]
    if problems:
        if unfinished and ranks.rank == 0:
            checkpoints.abandon(unfinished)
        raise error(problems[0])
