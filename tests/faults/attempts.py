"""Small stages run in this process, again and again on copies of a run folder; no fault by itself."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from rl_runs import metrics_of
from tiny_runs import load_stage, tiny_run

from r1pipe.config import read_config
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints

SETTINGS = {
    "cold_start": ("stage=cold_start", "stage.demonstrations=16", "stage.epochs=8"),
    "grpo": ("stage=grpo", "stage.minibatches=1"),  # as many optimizer steps as steps
}
STEPS = 4
EACH_SAVED = (f"stage.max_steps={STEPS}", "stage.save_every=1", f"stage.keep={STEPS}")


def begin(folder: Path, stage: str, *overrides: str) -> Path:
    """A run folder of a stage of four steps, each saved."""
    return tiny_run(folder, *SETTINGS[stage], *EACH_SAVED, *overrides)


def uninterrupted(folder: Path, stage: str) -> Path:
    """A finished run that others are compared with."""
    code, line = attempt(begin(folder, stage))
    saved = checkpoints.steps(RunFolder(folder).checkpoints)
    assert code == 0 and saved == [*range(1, STEPS + 1)], (code, line, saved)
    return folder


def attempt(folder: Path) -> tuple[int, str]:
    """Run a run folder's stage in this process: its exit code, and the line that it left for the user."""
    run = RunFolder(folder)
    run.error.unlink(missing_ok=True)
    try:
        load_stage(Path(read_config(run.config).stage.script).stem).main(folder)
    except SystemExit as left:
        return int(left.code or 0), run.error.read_text(encoding="utf-8").strip()
    return 0, ""


def interrupted(folder: Path, whole: Path, step: int) -> RunFolder:
    """A copy of a finished run as a kill after `step` leaves it."""
    shutil.copytree(whole, folder)
    run = RunFolder(folder)
    for path in (run.record, run.evaluation, run.samples):
        path.unlink(missing_ok=True)
    for later in checkpoints.steps(run.checkpoints):
        if later > step:
            shutil.rmtree(run.checkpoint(later))
    return run


def same_end(folder: Path, whole: Path) -> str:
    """What differs between the ends of two runs; empty where nothing does."""
    one, other = RunFolder(folder), RunFolder(whole)
    if not one.record.exists():
        return "no record"
    step = checkpoints.steps(other.checkpoints)[-1]
    if checkpoints.manifest_hash(one.checkpoint(step)) != checkpoints.manifest_hash(other.checkpoint(step)):
        return "other weights"
    if metrics_of(folder) != metrics_of(whole):
        return "other metrics"
    if names(one.rollouts.glob("*")) != names(other.rollouts.glob("*")):
        return "other tables of rollouts"
    if json.loads(one.evaluation.read_text()) != json.loads(other.evaluation.read_text()):
        return "another evaluation"
    return ""


def names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def first_lost(lost: Iterable[str], told: str) -> str:
    """What a row of the table says: what was lost the first time, or else what the user was told."""
    return next((line for line in lost if line), told)
