"""Named moments of a job, and how a process is stopped in one. No torch here: every process may read it.

A point is a function as its caller looks it up. Nothing in the product knows of it: `at` puts a wrapper in
the function's place, in the process that is to be stopped.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """A call of a function: before it or, with `after`, when it has returned."""

    target: str  # module:name of what is called
    after: bool = False
    file: str = ""  # count only calls with a path of such a name among their arguments; a pattern
    rank: int = 0  # which rank stops there, -1: the last one; much of a save is rank 0's alone


BEFORE_A_SAVE = {"before a save": Point("r1pipe.train.run:Run.save_checkpoint")}
DURING_A_SAVE = {
    "weights written, state not": Point("r1pipe.train.engine.engine:Engine.save"),
    "copied, not written": Point("r1pipe.train.engine.writing:Writer.write_copies", rank=-1),
    "written, not hashed": Point("r1pipe.runs.checkpoints:seal", rank=-1),
    "hashed by a rank": Point("r1pipe.runs.checkpoints:seal", after=True, rank=-1),
    "state written, manifest not": Point("r1pipe.runs.checkpoints:write_manifest"),
    "manifest written, name not": Point("pathlib:Path.rename", file=".step-*.unfinished"),
    "saved, old ones there": Point("pathlib:Path.rename", after=True, file=".step-*.unfinished"),
}
AFTER_A_SAVE = {"after a save": Point("r1pipe.train.run:Run.save_checkpoint", after=True, rank=-1)}
TRAINING = {
    "in an update": Point("r1pipe.train.engine.engine:Engine._backward", after=True, rank=-1),
    "between update and log": Point("r1pipe.train.run:Run.log"),
}
SAMPLING = {"in sampling": Point("r1pipe.train.rollout.batching:_Batch._collect", after=True, rank=-1)}
SHARDS = {
    "shard drawn, not written": Point("pathlib:Path.replace", file="*.parquet", rank=-1),
    "shard written": Point("pathlib:Path.replace", after=True, file="*.parquet", rank=-1),
}
SHARD_BEGUN = {"shard begun": Point("r1pipe.train.sft.rejection:_draw", rank=-1)}
JUDGING = {"in judging by rules": Point("r1pipe.rewards.accuracy:checker_of", rank=-1)}
JUDGING_BY_MODELS = {"in judging by models": Point("r1pipe.rewards.models:RewardScorer.__call__", rank=-1)}
ENDING = {
    "in evaluation": Point("r1pipe.train.evaluation.drawing:measure"),
    "evaluated, nothing written": Point("r1pipe.train.run:Run.finish"),
    "in writing samples": Point("pathlib:Path.replace", file="samples.json"),
    "in writing the record": Point("pathlib:Path.replace", file="record.json"),
    "record written": Point("pathlib:Path.replace", after=True, file="record.json"),
}
LAUNCHING = {  # in the process of the command line
    "between stages": Point("r1pipe.launch.pipeline:plan_run"),
    "run folder begun": Point("pathlib:Path.replace", file="config.json"),
    "job started": Point("r1pipe.launch.progress:Display.__init__", after=True),
}
SAVING = BEFORE_A_SAVE | DURING_A_SAVE | AFTER_A_SAVE
JOB = TRAINING | SAVING | SAMPLING | SHARD_BEGUN | SHARDS | JUDGING | JUDGING_BY_MODELS | ENDING
POINTS = JOB | LAUNCHING


def at(point: Point, hook: Callable[..., object]) -> None:
    """Have `hook` called at every call of the point in this process from now on, with the same arguments."""
    module, _, name = point.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    called = getattr(owner, attribute)

    @wraps(called)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        counts = not point.file or any(is_named(argument, point.file) for argument in arguments)
        if counts and not point.after:
            hook(*arguments)
        result = called(*arguments, **named)
        if counts and point.after:
            hook(*arguments)
        return result

    setattr(owner, attribute, wrapper)


def is_named(argument: Any, pattern: str) -> bool:
    return isinstance(argument, str | Path) and fnmatch(Path(argument).name, pattern)


def nth_call(nth: int, stop: Callable[[], object]) -> Callable[..., None]:
    """A hook that calls `stop` once: at the nth call, counted from 1."""
    calls = count(1)

    def hook(*_: Any) -> None:
        if next(calls) == nth:
            stop()

    return hook


def noted(name: str, path: Path) -> Callable[..., None]:
    """A hook that appends the point's name to a file: what a kill cannot lose."""

    def hook(*_: Any) -> None:
        with path.open("a") as file:
            file.write(f"{name}\n")

    return hook
