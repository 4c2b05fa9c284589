"""Chooses the run folder for a config: that of an unfinished run, of a finished one, or a new one."""

import secrets
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from r1pipe.config import (
    STAGE_TYPES,
    EvaluateConfig,
    FineTuneConfig,
    RewardModelConfig,
    RLConfig,
    RunConfig,
    to_mapping,
)
from r1pipe.config.changes import Change, changes, listed
from r1pipe.config.groups import upwards
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable
from r1pipe.runs import checkpoints, history, lineage
from r1pipe.runs.files import read_json
from r1pipe.runs.locks import check_not_running, was_interrupted

LABEL_KEYS = ("root", "parent", "recipe", "engine.name")  # names alone: a running job need not share them


@dataclass(frozen=True)
class RunPlan:
    """A stage's config with its parents, and the run folder it belongs to."""

    config: RunConfig
    run: RunFolder
    is_new: bool
    changed: tuple[Change, ...] = ()  # since the run was last launched
    extends_from: int = 0  # steps of the finished run, where the config asks for more
    sweep: str = ""  # the name of the sweep that starts it

    @property
    def done(self) -> bool:
        was_reopened = not self.extends_from or self.run.earlier_record(self.extends_from).exists()
        return self.run.record.exists() and was_reopened

    @property
    def is_bit_exact(self) -> bool:
        return all(change.same_bits for change in self.changed)

    @property
    def can_resume(self) -> bool:
        return all(change.allowed for change in self.changed)

    @property
    def is_same_job(self) -> bool:
        """Whether a running job already does what the config asks for."""
        return all(any(part in LABEL_KEYS for part in upwards(change.key)) for change in self.changed)

    def describe(self) -> str:
        """One line for the user on what is about to happen."""
        if self.is_new:
            return f"{self.run.run_id}: starts"
        if self.extends_from:
            return self._describe_extension()
        if self.done:
            other_values = "" if self.is_bit_exact else f", with other values: {listed(self.changed)}"
            return f"{self.run.run_id}: is already done{other_values}"
        steps = checkpoints.steps(self.run.checkpoints)
        where = f"from step {steps[-1]}" if steps else "from the beginning, as it has no checkpoint yet"
        changed = f" with {listed(self.changed)}" if self.changed else ""
        return f"{self.run.run_id}: resumes {where}{changed} (--fresh starts a new run)"

    def _describe_extension(self) -> str:
        schedule = self.config.stage.optim.schedule
        rate = f"follows the {schedule} schedule of the longer run"
        if schedule == "constant":
            rate = "stays the same"
        return (
            f"{self.run.run_id}: extends the finished run from step {self.extends_from} to "
            f"{self.config.stage.max_steps or 'the end of its epochs'} with {listed(self.changed)}; "
            f"the learning rate {rate} (--fresh starts a new run)"
        )


def place(config: RunConfig, fresh: bool = False, in_recipe: bool = False, sweep: str = "") -> RunPlan:
    """Choose the run among those of the same pipeline, stage and seed; `fresh` always starts a new one.

    - `in_recipe`, the newest finished run that differs only in keys that may change counts as done.
    - A newest run that finished with this config, but whose command was killed before it could report that,
      is done: a scheduler that restarts the command does not want the stage twice.
    - The newest run, if unfinished, resumes where only keys that may change differ; an older one only where
      no bit of the result changes.
    - A newest run that finished with fewer steps, and is the same otherwise, is extended.
    - In a `sweep` each config has a run of its own, finished or not.

    Raises ConfigError where the newest run cannot be extended, or is unfinished with another config and
    has work to lose.
    """
    new_run = RunFolder(Path(config.root).resolve() / new_run_id(config))
    new = RunPlan(config, new_run, is_new=True, sweep=sweep)
    wanted = publishable(to_mapping(config))  # as config.json holds it
    plans = [
        RunPlan(config, run, False, tuple(changes(read_json(run.config), wanted)))
        for run in ([] if fresh else runs_of(config))
    ]
    if not plans:
        return new
    newest = plans[-1]
    exact = [plan for plan in plans if plan.is_bit_exact]
    if sweep:
        return exact[-1] if exact else new
    done = [plan for plan in [*plans, *exact] if plan.can_resume and plan.done]
    if in_recipe and done:
        return done[-1]
    if newest.done and newest.is_bit_exact and was_interrupted(newest.run):
        return newest
    unfinished = [plan for plan in [newest, *exact] if plan.can_resume and not plan.done]
    if unfinished:
        return unfinished[-1]
    if not in_recipe and (extension := extension_of(newest)):
        return extension
    check_nothing_to_lose(newest, in_recipe)
    return new


def extension_of(plan: RunPlan) -> RunPlan | None:
    """The finished run with more steps, if the config changes nothing else that affects the result.

    Raises ConfigError where the stage cannot be extended.
    """
    decisive = [change for change in plan.changed if not change.allowed]
    if [change.key for change in decisive] != ["stage.max_steps"]:
        return None
    finished, wanted = finished_steps(plan.run), plan.config.stage.max_steps
    if not finished or 0 < wanted <= finished:
        return None
    if obstacle := obstacle_to_extension(plan, finished, decisive[0].old):
        raise ConfigError(
            f"{plan.run.run_id} finished after {finished} steps and cannot be extended with "
            f"stage.max_steps={wanted}: {obstacle}; --fresh starts a new run"
        )
    return replace(plan, extends_from=finished)


def finished_steps(run: RunFolder) -> int:
    """Steps after which a run finished, if it has trained no further since; else 0."""
    if run.record.exists():
        return history.steps_of(run)
    newest = checkpoints.steps(run.checkpoints)[-1:]
    return newest[0] if newest and run.earlier_record(newest[0]).exists() else 0


def obstacle_to_extension(plan: RunPlan, finished: int, old_max_steps: int) -> str | None:
    stage = plan.config.stage
    if isinstance(stage, RewardModelConfig):
        return "it trains two models one after the other, and keeps the optimizer of the last one only"
    if isinstance(stage, RLConfig) and stage.preference is not None:
        last = stage.preference.last_steps
        return f"preference rewards belong to its last steps (stage.preference.last_steps={last}) alone"
    if isinstance(stage, FineTuneConfig) and (not old_max_steps or finished < old_max_steps):
        return f"its data gives no more steps in stage.epochs={stage.epochs}"
    state = plan.run.checkpoint(finished) / checkpoints.ENGINE
    return None if state.is_dir() else f"{state}, the state to resume from, is missing"


def runs_of(config: RunConfig) -> list[RunFolder]:
    """The runs of this pipeline, stage and seed, oldest first. Warns of those whose config.json is broken."""
    runs = []
    for run in lineage.run_folders(Path(config.root)):
        mapping = read_json(run.config)
        if mapping and key_of(mapping) == (config.pipeline, config.seed, config.stage.name):
            runs.append(run)
        elif not mapping and run.run_id.startswith(run_id_prefix(config)):
            print(f"warning: {unreadable_message(run)}", file=sys.stderr, flush=True)
    return runs


def unreadable(root: Path) -> list[RunFolder]:
    """Run folders whose config.json is broken."""
    return [run for run in lineage.run_folders(root) if not read_json(run.config)]


def unreadable_message(run: RunFolder) -> str:
    return f"{run.config} cannot be read, so its run is ignored; fix that file, or move the folder away"


def key_of(mapping: dict) -> tuple:
    """Pipeline, seed and stage name of a config.json; None for what it lacks."""
    stage = mapping.get("stage")
    stage_name = stage.get("name") if isinstance(stage, dict) else None
    return mapping.get("pipeline"), mapping.get("seed"), stage_name


def check_nothing_to_lose(plan: RunPlan, in_recipe: bool) -> None:
    """Raises ConfigError where a run was interrupted with another config and has a checkpoint or samples.

    A stage that only measures makes both again; a run that is still running may have another one beside it.
    """
    run = plan.run
    try:
        check_not_running(run)
    except EnvironmentProblem:
        return
    stage_type = STAGE_TYPES.get(read_json(run.config)["stage"]["name"])
    if run.record.exists() or stage_type is EvaluateConfig or not checkpoints.holds_work(run):
        return
    steps = checkpoints.steps(run.checkpoints)
    where = f"at step {steps[-1]}" if steps else "sampling"
    restart = "pipeline=NAME starts another reproduction" if in_recipe else "--fresh starts a new run"
    decisive = [change for change in plan.changed if not change.allowed]
    raise ConfigError(
        f"{run.run_id} is unfinished ({where}) with another config: {listed(decisive)}; "
        f"give the old values to resume it, or {restart}"
    )


def new_run_id(config: RunConfig) -> str:
    """Sorts by time within a stage and seed: grpo-s0-20261123-211502-ab12."""
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{run_id_prefix(config)}{now}-{secrets.token_hex(2)}"


def run_id_prefix(config: RunConfig) -> str:
    return f"{config.stage.name}-s{config.seed}-"
