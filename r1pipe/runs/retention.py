"""Which checkpoints of a run stay: the last ones, the best one, and those that other runs came from.

No torch: what names a checkpoint as its parent lies in the run folders beside it.
"""

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
    """Remove a run's finished checkpoints but those that stay, and what unfinished and damaged ones left.

    To be called when the newest is whole and durable. The newest `keep`, at least one, stay; so does the
    best by a metric, `best_by` = (its name, "max" or "min"), and whatever another run names as its parent.
    """
    there = checkpoints.steps(run.checkpoints)
    older = there[: -max(1, keep)]
    if older:
        stay = named_by_others(run, older)
        stay |= {step for step in older if run.earlier_record(step).exists()}  # it was extended from here
        if best_by is not None:
            stay |= best(run.metrics, there, *best_by)
        for step in older:
            if step not in stay:
                shutil.rmtree(run.checkpoint(step))
    for leftover in run.checkpoints.glob(".step-*"):
        shutil.rmtree(leftover)


def best(metrics: Path, steps: Collection[int], name: str, direction: str) -> set[int]:
    """The step among `steps` at which a metric was best, the earliest of equals; empty where none has it.

    Raises CheckpointError naming the line that is none.
    """
    found: dict[int, float] = {}
    for _, row in metric_lines(metrics):
        value, step = row.get(name, math.nan), int(row["step"])
        if step in steps and -math.inf < value < math.inf:
            found[step] = value if direction == "max" else -value
    return {max(found, key=lambda step: (found[step], -step))} if found else set()


def unknown_best(metrics: Path, stage: StageConfig, step: int) -> str | None:
    """What is wrong with `stage.keep_best` where no step up to this one has logged it, though one would have.

    Raises CheckpointError naming the line of metrics.jsonl that is none.
    """
    name = stage.keep_best
    if name is None or step < logged_from(stage, name):
        return None
    known = {key for _, row in metric_lines(metrics) for key in row} - {"step", "time"}
    if name in known:
        return None
    return (
        f"stage.keep_best={name} is no metric of this run; {nearest(name, known)}; give one that is, or "
        "stage.keep_best=null, and the same command goes on from this step"
    )


def logged_from(stage: StageConfig, name: str) -> int:
    """The step by which a run of the stage has logged a metric, if it logs it at all."""
    if name.startswith("eval/"):
        return stage.eval.every
    if isinstance(stage, RLConfig) and stage.preference and name.startswith("rewards/"):
        return max(1, stage.max_steps - stage.preference.last_steps + 1)
    return 1 + stage.ppo.value_warmup_steps if isinstance(stage, RLConfig) and stage.ppo else 1


def named_by_others(run: RunFolder, steps: Collection[int]) -> set[int]:
    """Those of `steps` whose checkpoints the config or record of another run under the root names.

    The names are looked up in the text: a file that is being written, or is broken, still holds them.
    """
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for name in (run.config.name, run.record.name)
        for path in run.path.parent.glob(f"*/{name}")
        if path.parent != run.path
    ]
    names = {step: f'{run.run_id}/{run.checkpoints.name}/{run.checkpoint(step).name}"' for step in steps}
    return {step for step, name in names.items() if any(name in text for text in texts)}
