"""The file names of a run folder, and where conf/, stages/ and data/ are (checkout or wheel)."""

import importlib.resources
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

from r1pipe.core.errors import CheckpointError, EnvironmentProblem


def _home(name: str) -> Path:
    """`conf`, `stages` or `data`: beside the package in a checkout, inside it in a wheel."""
    package = Path(str(importlib.resources.files("r1pipe")))
    for folder in (package / "_bundled" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise EnvironmentProblem(
        f"the folder {name}/ of r1pipe is missing beside {package}; install r1pipe again"
    )


conf_dir = partial(_home, "conf")
stages_dir = partial(_home, "stages")
content_dir = partial(_home, "data")  # tokenizer/, base/, world/


def inside(folder: Path, name: str, source: Path) -> Path:
    """The path of `name` in a folder; `source` is the file that contains the name.

    Raises CheckpointError if the path, or what it links to, is outside the folder.
    """
    try:
        path = folder / name
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
        if name and path.resolve().is_relative_to(folder.resolve()):
            return path
    except (OSError, RuntimeError, ValueError):  # circular links, NUL in the name, name too long
        pass
    raise CheckpointError(f"{source}: {name!r} is not a file of {folder}; copy or make the checkpoint again")


IMPORTED = "imported"  # beside the run folders: checkpoints of `r1pipe import`
SET_ASIDE = "set_aside.jsonl"  # in a run's data/: rejected rows, each with file, line and reason


class RunFolder:
    """Names inside `<root>/<run id>/`; only `create` writes anything."""

    HEARTBEAT = "heartbeat-"  # in log/, one file a rank (r1pipe.runs.heartbeat)
    AGENT = "agent-"  # in log/, one file a host (r1pipe.runs.agents)

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.config_history = self.path / "config_history.jsonl"  # see r1pipe.runs.record.note
        self.command = self.path / "command.txt"
        self.env = self.path / "env.json"
        self.diff = self.path / "code.diff"  # changes to the git revision
        self.mirrored = self.path / "mirrored"  # "whole" or "behind": MLflow's copy of this run
        self.sweep = self.path / "sweep"  # the name of the sweep that started it (r1pipe.cli.sweep)
        self.log = self.path / "log"
        self.launcher_log = self.log / "launcher.txt"  # of all sessions
        self.orders = self.log / "launch.json"  # what the hosts of a job are to start (r1pipe.runs.agents)
        self.script = self.path / "slurm.sh"  # for sbatch (r1pipe.launch.slurm)
        self.slurm = self.path / "slurm.json"  # {"job": int, "code": int}: of the newest job; code at its end
        self.metrics = self.path / "metrics.jsonl"  # {"step": int, "time": s, name: number, ...}
        self.tripwires = self.path / "tripwires.jsonl"  # {"step": int, "name": str, "message": str}
        # of the short evaluations: {"step": int, "metrics": {name: number}, "samples": [as in samples.json]}
        self.dev_evaluations = self.path / "dev_evaluations.jsonl"
        self.timeline = self.path / "timeline.json"  # of a pipeline's last step (r1pipe.plan.timeline)
        self.progress = self.path / "progress.jsonl"  # {"what": str, "done": int, "total": int, "time": s}
        self.pid = self.path / "pid"  # the job's processes (r1pipe.runs.locks), while it runs
        self.launch = self.path / "launch"  # the token of the newest launch (r1pipe.runs.locks)
        self.guard = self.path / ".pid.guard"  # locked while `pid` and `launch` are read and written
        self.stop = self.path / "stop"  # a request to stop (r1pipe.runs.stopping)
        self.error = self.path / "error.txt"  # one line: the job's user error
        self.rewards = self.path / "rewards.json"  # custom rewards: {name: {"source", "hash", "version"}}
        self.teacher = self.path / "teacher.json"  # of distillation: the teacher, and what it took
        self.rollouts = self.path / "rollouts"
        self.data = self.path / "data"
        self.source = self.data / "source.json"  # the data's {"hash", "files"} at the start of the run
        self.dataset = self.data / "samples.parquet"  # of rejection sampling; distillation reads it
        self.distributions = self.data / "distributions.arrow"  # of stage.extract=distribution, beside it
        self.drawn = self.data / "drawn"  # a benchmark's completions until the record exists
        self.trained_on = self.data / "trained_on.parquet"  # of SFT and reward models (r1pipe.runs.samples)
        self.evaluated = self.data / "evaluated.json"  # which prompts the final evaluation had, and how
        self.screening = self.data / "screening.json"  # what was found in the training data
        self.samples = self.path / "samples.json"  # the same held-out prompts after every stage
        self.evaluation = self.path / "evaluation.json"  # the table's metrics, after the last step
        self.completions = (
            self.path / "evaluation.parquet"
        )  # every one of the final evaluation (runs.problems)
        self.checkpoints = self.path / "checkpoints"
        self.record = self.path / "record.json"  # written last: the run has finished

    def create(self) -> None:
        """Create the folder. Raises EnvironmentProblem if it cannot be written."""
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
        return self.path / f"code-{sha[:12]}.diff"

    def earlier_record(self, step: int) -> Path:
        """The record of a run that finished at this step and was extended later."""
        return self.path / f"record-step-{step}.json"

    def heartbeat(self, rank: int) -> Path:
        return self.log / f"{self.HEARTBEAT}{rank}.json"

    def agent(self, node: int) -> Path:
        return self.log / f"{self.AGENT}{node}.json"

    def stack(self, rank: int) -> Path:
        """Where a rank writes its stack traces on SIGUSR1."""
        return self.log / f"rank-{rank}.txt"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"
