"""Which checkpoints of a run are kept: the newest, the best, and the parents of other runs."""

import math
import shutil
from collections.abc import Collection
from pathlib import Path

from r1pipe.config import RLConfig, StageConfig
from r1pipe.core.errors import nearest
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.runs.files import metric_lines


def prune(run: RunFolder, keep: int, best_by: tuple[str, str] | None = None) -> None:
    """Remove a run's older checkpoints, and unfinished and damaged ones.

    To be called when the newest is complete. The newest `keep`, at least one, are kept; so are the best by a
    metric, `best_by` = (name, "max" or "min"), and those that another run names as its parent.
    """
    steps = checkpoints.steps(run.checkpoints)
    older = steps[: -max(1, keep)]
    if older:
        kept = named_by_others(run, older)
        kept |= {step for step in older if run.earlier_record(step).exists()}  # the run was extended from it
        if best_by is not None:
            kept |= best(run.metrics, steps, *best_by)
        for step in older:
            if step not in kept:
                shutil.rmtree(run.checkpoint(step))
    for leftover in run.checkpoints.glob(".step-*"):
        shutil.rmtree(leftover)


def best(metrics: Path, steps: Collection[int], name: str, direction: str) -> set[int]:
    """The step among `steps` at which a metric was best, the earliest of equals; empty if none has logged it.

    Raises CheckpointError naming a damaged line.
    """
    values: dict[int, float] = {}
    for _, row in metric_lines(metrics):
        value, step = row.get(name, math.nan), int(row["step"])
        if step in steps and -math.inf < value < math.inf:
            values[step] = value if direction == "max" else -value
    return {max(values, key=lambda step: (values[step], -step))} if values else set()


def has_stalled(metrics: Path, name: str, direction: str, patience: int) -> bool:
    """Whether the last `patience` logged values of a metric are all no better than the best one before them.

    Raises CheckpointError naming a damaged line.
    """
    logged = [row[name] for _, row in metric_lines(metrics) if math.isfinite(row.get(name, math.nan))]
    values = logged if direction == "max" else [-value for value in logged]
    return len(values) > patience and max(values[-patience:]) <= max(values[:-patience])


def unknown_best(metrics: Path, stage: StageConfig, step: int) -> str | None:
    """The error message if no step up to this one has logged `stage.keep_best`, though it should have.

    Raises CheckpointError naming a damaged line of metrics.jsonl.
    """
    name = stage.keep_best
    if name is None or step < logged_from(stage, name):
        return None
    known = {key for _, row in metric_lines(metrics) for key in row} - {"step", "time"}
    if name in known:
        return None
    return (
        f"stage.keep_best={name} is no metric of this run; {nearest(name, known)}; give one that is, or "
        "stage.keep_best=null, and the same command resumes from this step"
    )


def logged_from(stage: StageConfig, name: str) -> int:
    """The first step at which a run of the stage logs a metric, if it logs it at all."""
    if name.startswith("eval/"):
        return stage.eval.every
    if isinstance(stage, RLConfig) and stage.preference and name.startswith("rewards/"):
        return max(1, stage.max_steps - stage.preference.last_steps + 1)
    return 1 + stage.ppo.value_warmup_steps if isinstance(stage, RLConfig) and stage.ppo else 1


def named_by_others(run: RunFolder, steps: Collection[int]) -> set[int]:
    """Those of `steps` whose checkpoints another run under the root names in its config or record.

    This searches the files' text, which also works for damaged files.
    """
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for name in (run.config.name, run.record.name)
        for path in run.path.parent.glob(f"*/{name}")
        if path.parent != run.path
    ]
    names = {step: f'{run.run_id}/{run.checkpoints.name}/{run.checkpoint(step).name}"' for step in steps}
    return {step for step, name in names.items() if any(name in text for text in texts)}
