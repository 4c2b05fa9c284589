"""Whether a stage starts a new run, resumes or extends an earlier one, or is done."""

import secrets
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from r1pipe.config import EvaluateConfig, FineTuneConfig, RewardModelConfig, RLConfig, RunConfig, to_mapping
from r1pipe.config.changes import Change, changes, listed
from r1pipe.config.groups import upwards
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable
from r1pipe.runs import checkpoints, lineage, record
from r1pipe.runs.answers import kept_answers
from r1pipe.runs.files import read_json
from r1pipe.runs.locks import check_not_running, was_interrupted
from r1pipe.runs.results import stage_name

LABEL_KEYS = ("root", "parent", "recipe", "engine.name")  # names alone: a running job need not share them


class Action(Enum):
    START = "start"  # it is new
    RESUME = "resume"  # it is unfinished
    EXTEND = "extend"  # it has finished, and the config asks for more steps
    SKIP = "skip"  # it has finished


@dataclass(frozen=True)
class RunPlan:
    """A stage's config with its parents, the run folder it belongs to, and what is done with that."""

    config: RunConfig
    run: RunFolder
    action: Action
    changed: tuple[Change, ...] = ()  # since the run was last launched
    extends_from: int = 0  # steps of the finished run
    sweep: str = ""  # the name of the sweep that starts it

    @property
    def done(self) -> bool:
        """Whether the run has finished by now."""
        was_reopened = not self.extends_from or self.run.earlier_record(self.extends_from).exists()
        return self.run.record.exists() and was_reopened

    @property
    def is_bit_exact(self) -> bool:
        return all(change.same_bits for change in self.changed)

    @property
    def decisive(self) -> list[Change]:
        """The changes with which the run cannot resume."""
        return [change for change in self.changed if not change.allowed]

    @property
    def is_same_job(self) -> bool:
        """Whether a running job already does what the config asks for."""
        return all(any(part in LABEL_KEYS for part in upwards(change.key)) for change in self.changed)

    def describe(self) -> str:
        run_id, fresh = self.run.run_id, "(--fresh starts a new run)"
        if self.action is Action.START:
            return f"{run_id}: starts"
        if self.action is Action.SKIP:
            other_values = "" if self.is_bit_exact else f", with other values: {listed(self.changed)}"
            return f"{run_id}: is already done{other_values}"
        if self.action is Action.EXTEND:
            schedule = self.config.stage.optim.schedule
            rate = f"follows the {schedule} schedule of the longer run"
            if schedule == "constant":
                rate = "stays the same"
            last = self.config.stage.max_steps or "the end of its epochs"
            return (
                f"{run_id}: extends the finished run from step {self.extends_from} to {last} with "
                f"{listed(self.changed)}; the learning rate {rate} {fresh}"
            )
        steps = checkpoints.steps(self.run.checkpoints)
        where = "from the beginning, as it has no checkpoint yet"
        if steps:
            where = f"from step {steps[-1]}"
        elif kept := kept_answers(self.run):
            where = f"with the {kept:,} answers that are kept"
        changed = f" with {listed(self.changed)}" if self.changed else ""
        return f"{run_id}: resumes {where}{changed} {fresh}"


def plan_run(config: RunConfig, fresh: bool = False, in_recipe: bool = False, sweep: str = "") -> RunPlan:
    """Plan with the runs of the same pipeline, stage and seed; `fresh` always starts a new one.

    - `in_recipe`, the newest finished run that differs only in keys that may change is skipped.
    - A newest run that finished with this config, but whose command was killed before it could report that,
      is skipped: a scheduler that restarts the command does not want the stage twice.
    - The newest run, if unfinished, resumes where only keys that may change differ; an older one only where
      no bit of the result changes.
    - A newest run that finished with fewer steps, and is the same otherwise, is extended.
    - In a `sweep` each config has a run of its own, finished or not.

    Raises ConfigError where the newest run cannot be extended, or is unfinished with another config and
    has work to lose.
    """
    earlier = [] if fresh else earlier_runs(config)
    newest = earlier[-1] if earlier else None
    same = [plan for plan in earlier if plan.is_bit_exact]
    usable = [plan for plan in [*earlier, *same] if not plan.decisive]  # the most wanted comes last
    finished = [plan for plan in usable if plan.action is Action.SKIP]
    unfinished = [plan for plan in usable if plan.action is Action.RESUME and plan in (newest, *same)]
    if sweep:
        found = same
    elif in_recipe and finished:
        found = finished
    elif newest and newest.action is Action.SKIP and newest.is_bit_exact and was_interrupted(newest.run):
        found = [newest]
    else:
        found = unfinished
    if found:
        return found[-1]
    if newest and not sweep:
        if not in_recipe and (extension := extension_of(newest)):
            return extension
        check_nothing_to_lose(newest, in_recipe)
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run_id = f"{run_id_prefix(config)}{now}-{secrets.token_hex(2)}"
    return RunPlan(config, RunFolder(Path(config.root).resolve() / run_id), Action.START, sweep=sweep)


def earlier_runs(config: RunConfig) -> list[RunPlan]:
    """The runs of this pipeline, stage and seed, oldest first. Warns of those whose config.json is broken."""
    wanted = publishable(to_mapping(config))  # as config.json holds it
    plans = []
    for run in lineage.run_folders(Path(config.root)):
        mapping = read_json(run.config)
        if mapping and key_of(mapping) == (config.pipeline, config.seed, config.stage.name):
            action = Action.SKIP if run.record.exists() else Action.RESUME
            plans.append(RunPlan(config, run, action, tuple(changes(mapping, wanted))))
        elif not mapping and run.run_id.startswith(run_id_prefix(config)):
            print(f"warning: {unreadable_message(run)}", file=sys.stderr, flush=True)
    return plans


def extension_of(plan: RunPlan) -> RunPlan | None:
    """The finished run with more steps, if the config changes nothing else that affects the result.

    Raises ConfigError where the stage cannot be extended.
    """
    if [change.key for change in plan.decisive] != ["stage.max_steps"]:
        return None
    run, stage, old_max_steps = plan.run, plan.config.stage, plan.decisive[0].old
    finished = 0  # steps after which the run finished, if it has trained no further since
    if run.record.exists():
        finished = record.steps_of(run)
    else:
        newest = checkpoints.steps(run.checkpoints)[-1:]
        if newest and run.earlier_record(newest[0]).exists():
            finished = newest[0]
    if not finished or 0 < stage.max_steps <= finished:
        return None
    state = run.checkpoint(finished) / checkpoints.ENGINE
    obstacle = "" if state.is_dir() else f"{state}, the state to resume from, is missing"
    if isinstance(stage, RewardModelConfig):
        obstacle = "it trains two models one after the other, and keeps the optimizer of the last one only"
    elif isinstance(stage, RLConfig) and stage.preference is not None:
        last = stage.preference.last_steps
        obstacle = f"preference rewards belong to its last steps (stage.preference.last_steps={last}) alone"
    elif isinstance(stage, FineTuneConfig) and (not old_max_steps or finished < old_max_steps):
        obstacle = f"its data gives no more steps in stage.epochs={stage.epochs}"
    if obstacle:
        raise ConfigError(
            f"{run.run_id} finished after {finished} steps and cannot be extended with "
            f"stage.max_steps={stage.max_steps}: {obstacle}; --fresh starts a new run"
        )
    return replace(plan, action=Action.EXTEND, extends_from=finished)


def unreadable(root: Path) -> list[RunFolder]:
    return [run for run in lineage.run_folders(root) if not read_json(run.config)]


def unreadable_message(run: RunFolder) -> str:
    return f"{run.config} cannot be read, so its run is ignored; fix that file, or move the folder away"


def key_of(mapping: dict) -> tuple:
    """Pipeline, seed and stage name of a config.json; None for what it lacks."""
    return mapping.get("pipeline"), mapping.get("seed"), stage_name(mapping)


def check_nothing_to_lose(plan: RunPlan, in_recipe: bool) -> None:
    """Raises ConfigError where a run was interrupted with another config and has a checkpoint or samples.

    A stage that only measures makes both again; a run that is still running may have another one beside it.
    """
    run = plan.run
    try:
        check_not_running(run)
    except EnvironmentProblem:
        return
    only_measures = isinstance(plan.config.stage, EvaluateConfig)
    if plan.action is Action.SKIP or only_measures or not checkpoints.holds_work(run):
        return
    steps = checkpoints.steps(run.checkpoints)
    where = f"at step {steps[-1]}" if steps else "sampling"
    restart = "pipeline=NAME starts another reproduction" if in_recipe else "--fresh starts a new run"
    raise ConfigError(
        f"{run.run_id} is unfinished ({where}) with another config: {listed(plan.decisive)}; "
        f"give the old values to resume it, or {restart}"
    )


def run_id_prefix(config: RunConfig) -> str:
    """Run ids sort by time within a stage and seed: grpo-s0-20261123-211502-ab12."""
    return f"{config.stage.name}-s{config.seed}-"
