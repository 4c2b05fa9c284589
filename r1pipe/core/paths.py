"""Every file name in a run folder, and where conf/, stages/ and data/ are found (checkout or wheel)."""

import importlib.resources
import tempfile
from contextlib import suppress
from pathlib import Path

from r1pipe.core.errors import CheckpointError, EnvironmentProblem


def _home(name: str) -> Path:
    """`conf`, `stages` or `data`: beside the package in a checkout, inside it in a wheel."""
    package = Path(str(importlib.resources.files("r1pipe")))
    for place in (package / "_bundled" / name, package.parent / name):
        if place.is_dir():
            return place
    raise EnvironmentProblem(
        f"the folder {name}/ of r1pipe is missing beside {package}; install r1pipe again"
    )


def conf_dir() -> Path:
    return _home("conf")


def stages_dir() -> Path:
    return _home("stages")


def content_dir() -> Path:
    """The bundled content: tokenizer/, base/, world/."""
    return _home("data")


def inside(folder: Path, name: str, told_by: Path) -> Path:
    """The path of `name` in a folder, as the file `told_by` gives it.

    Raises CheckpointError where it, or what it links to, lies elsewhere.
    """
    try:
        path = folder / name
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
        if name and path.resolve().is_relative_to(folder.resolve()):
            return path
    except (OSError, RuntimeError, ValueError):  # links in a circle; a NUL in the name; too long a name
        pass
    raise CheckpointError(f"{told_by}: {name!r} is no file of {folder}; copy or make the checkpoint again")


IMPORTED = "imported"  # beside the run folders: checkpoints that `r1pipe import` took in


SET_ASIDE = "set_aside.jsonl"  # in a run's data/: rows that were not used, each with its place and reason


class RunFolder:
    """Names inside `<root>/<run id>/`; only `create` writes anything."""

    HEARTBEAT = "heartbeat-"  # in log/, one file a rank (r1pipe.runs.heartbeat)

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.config_history = self.path / "config_history.jsonl"  # what it went on with (r1pipe.runs.history)
        self.command = self.path / "command.txt"
        self.env = self.path / "env.json"
        self.diff = self.path / "code.diff"  # what the code was besides its git revision
        self.mirrored = self.path / "mirrored"  # "whole" or "behind": how far MLflow has this run
        self.sweep = self.path / "sweep"  # the name of the sweep that started it (r1pipe.cli.sweep)
        self.log = self.path / "log"
        self.launcher_log = self.log / "launcher.txt"  # of all sessions, from the first one's start on
        self.metrics = self.path / "metrics.jsonl"  # {"step": int, "time": s, name: number, ...}
        self.tripwires = self.path / "tripwires.jsonl"  # {"step": int, "name": str, "message": str}
        self.progress = (
            self.path / "progress.jsonl"
        )  # {"what": str, "done": int, "total": int, "time": s, ...}
        self.pid = (
            self.path / "pid"
        )  # the processes that have the run (runs/locks.py); gone when it has ended
        self.guard = self.path / ".pid.guard"  # locked while `pid` is looked at and written
        self.stop = self.path / "stop"  # asks the ranks to stop (r1pipe.runs.stopping)
        self.error = self.path / "error.txt"  # the one line of a user error, written by the job
        self.rollouts = self.path / "rollouts"
        self.data = self.path / "data"
        self.source = self.data / "source.json"  # the data's {"hash", "files"} when the run began
        self.dataset = self.data / "samples.parquet"  # what rejection sampling kept: distillation reads it
        self.samples = self.path / "samples.json"  # the same held-out prompts after every stage
        self.evaluation = (
            self.path / "evaluation.json"
        )  # the numbers of the table, written after the last step
        self.checkpoints = self.path / "checkpoints"
        self.record = self.path / "record.json"  # written last: its presence means done

    def create(self) -> None:
        """Make the folder. Raises EnvironmentProblem where it cannot be made or written."""
        try:
            self.log.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.path} cannot be written ({error.strerror}); give root=DIR, which you may write"
            ) from None

    @property
    def run_id(self) -> str:
        return self.path.name

    def earlier_diff(self, sha: str) -> Path:
        """A `code.diff` of the run's earlier sessions."""
        return self.path / f"code-{sha[:12]}.diff"

    def earlier_record(self, step: int) -> Path:
        """The record of when the run had finished at this step, before it was extended."""
        return self.path / f"record-step-{step}.json"

    def heartbeat(self, rank: int) -> Path:
        return self.log / f"{self.HEARTBEAT}{rank}.json"

    def stack(self, rank: int) -> Path:
        """Where a rank writes what it is doing, when it is asked by SIGUSR1."""
        return self.log / f"rank-{rank}.txt"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"
