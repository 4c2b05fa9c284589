"""Which run folder a config belongs to: that of an unfinished run, of a finished one, or a new one."""

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

NOT_THE_JOBS = ("root", "parent", "recipe", "engine.name")  # keys: how a thing is called, or what comes after


@dataclass(frozen=True)
class RunPlan:
    """A stage's config with its parents, and the run folder it belongs to."""

    config: RunConfig
    run: RunFolder
    is_new: bool
    changed: tuple[Change, ...] = ()  # since the run was launched last
    extends_from: int = 0  # steps after which the run had finished, where the config asks for more
    sweep: str = ""  # the name of the sweep that starts it

    @property
    def done(self) -> bool:
        was_reopened = not self.extends_from or self.run.earlier_record(self.extends_from).exists()
        return self.run.record.exists() and was_reopened

    @property
    def same_bits(self) -> bool:
        return all(change.same_bits for change in self.changed)

    @property
    def fits(self) -> bool:
        return all(change.allowed for change in self.changed)

    @property
    def is_same_job(self) -> bool:
        """Whether a job that is running does what the config asks for."""
        return all(any(part in NOT_THE_JOBS for part in upwards(change.key)) for change in self.changed)

    def says(self) -> str:
        """One line for the user on what is about to happen."""
        if self.is_new:
            return f"{self.run.run_id}: starts"
        if self.extends_from:
            return self._extension()
        if self.done:
            other = f", with other values: {listed(self.changed)}" if not self.same_bits else ""
            return f"{self.run.run_id}: is done already{other}"
        steps = checkpoints.steps(self.run.checkpoints)
        where = f"from step {steps[-1]}" if steps else "from its beginning, as it has no checkpoint yet"
        changed = f" with {listed(self.changed)}" if self.changed else ""
        return f"{self.run.run_id}: goes on {where}{changed} (--fresh starts anew)"

    def _extension(self) -> str:
        steps, schedule = self.config.stage.max_steps, self.config.stage.optim.schedule
        rate = (
            "stays the same"
            if schedule == "constant"
            else f"follows the {schedule} schedule of the longer run"
        )
        return (
            f"{self.run.run_id}: extends the finished run from step {self.extends_from} to "
            f"{steps or 'the end of its epochs'} with {listed(self.changed)}; the learning rate {rate} "
            "(--fresh starts a new run)"
        )


def place(config: RunConfig, fresh: bool = False, in_recipe: bool = False, sweep: str = "") -> RunPlan:
    """Where the stage's run is: an unfinished one of this config, or a new one.

    The newest run of the same pipeline, stage and seed, if unfinished, goes on with another config where only
    keys that may change are different. Raises ConfigError where others are and the run has something to lose.
    An older one goes on with its own config alone. `fresh` starts anew; a recipe's walk (`in_recipe`) takes a
    finished run, too, of this config or of one that differs in keys that may change. So does every call where
    the newest run has finished with this config and a kill kept its command from saying so: a scheduler that
    starts the command again does not want the stage again. A newest run that finished with fewer steps, and
    is the same otherwise, is extended; ConfigError where it cannot be. In a sweep each config has a run of
    its own, finished or not.
    """
    wanted = publishable(to_mapping(config))  # as it stands in config.json
    known = [
        RunPlan(config, run, False, tuple(changes(read_json(run.config), wanted)))
        for run in ([] if fresh else runs_of(config))
    ]
    exact = [placed for placed in known if placed.same_bits]
    new = RunPlan(
        config, RunFolder(Path(config.root).resolve() / new_run_id(config)), is_new=True, sweep=sweep
    )
    if sweep:
        return exact[-1] if exact else new
    done = [placed for placed in [*known, *exact] if placed.fits and placed.done]
    if in_recipe and done:
        return done[-1]
    if known and known[-1].done and known[-1].same_bits and was_interrupted(known[-1].run):
        return known[-1]
    half_done = [placed for placed in [*known[-1:], *exact] if placed.fits and not placed.done]
    if half_done:
        return half_done[-1]
    if known and not in_recipe and (extended := extension_of(known[-1])):
        return extended
    if known and is_interrupted(known[-1].run) and has_something_to_lose(known[-1].run):
        raise refusal(known[-1], in_recipe)
    return new


def extension_of(placed: RunPlan) -> RunPlan | None:
    """The finished run with more steps, where its config asks for that and for nothing else that decides what
    it computes. Raises ConfigError where the stage cannot be extended."""
    decisive = [change for change in placed.changed if not change.allowed]
    if [change.key for change in decisive] != ["stage.max_steps"]:
        return None
    finished, wanted = finished_steps(placed.run), placed.config.stage.max_steps
    if not finished or 0 < wanted <= finished:
        return None
    if why := not_extendable(placed, finished, decisive[0].old):
        raise ConfigError(
            f"{placed.run.run_id} finished after {finished} steps and cannot be extended with "
            f"stage.max_steps={wanted}: {why}; --fresh starts a new run"
        )
    return replace(placed, extends_from=finished)


def finished_steps(run: RunFolder) -> int:
    """Steps after which a run had finished, if it has made none since; else 0."""
    if run.record.exists():
        return history.steps_of(run)
    newest = checkpoints.steps(run.checkpoints)[-1:]
    return newest[0] if newest and run.earlier_record(newest[0]).exists() else 0


def not_extendable(placed: RunPlan, finished: int, old_max_steps: int) -> str | None:
    """Why a finished run can do no more steps; None where it can."""
    stage = placed.config.stage
    if isinstance(stage, RewardModelConfig):
        return "it trains two models one after the other, and keeps the optimizer of the last one only"
    if isinstance(stage, RLConfig) and stage.preference is not None:
        last = stage.preference.last_steps
        return f"preference rewards belong to its last steps (stage.preference.last_steps={last}) alone"
    if isinstance(stage, FineTuneConfig) and (not old_max_steps or finished < old_max_steps):
        return f"its data gives no more steps in stage.epochs={stage.epochs}"
    state = placed.run.checkpoint(finished) / checkpoints.ENGINE
    return None if state.is_dir() else f"{state}, the state to resume from, is missing"


def runs_of(config: RunConfig) -> list[RunFolder]:
    """The runs under the root of this pipeline, stage and seed, oldest first; warns of those that may be one,
    but whose config.json cannot be read."""
    wanted, found = (config.pipeline, config.seed, config.stage.name), []
    for run in lineage.run_folders(Path(config.root)):
        known = read_json(run.config)
        if known and key_of(known) == wanted:
            found.append(run)
        elif not known and run.run_id.startswith(run_id_prefix(config)):
            print(f"warning: {left_out(run)}", file=sys.stderr, flush=True)
    return found


def unreadable(root: Path) -> list[RunFolder]:
    """Run folders whose config.json is broken: no command knows what they are."""
    return [run for run in lineage.run_folders(root) if not read_json(run.config)]


def left_out(run: RunFolder) -> str:
    """One line for the user."""
    return f"{run.config} cannot be read, so its run is left out; mend that file, or move the folder away"


def key_of(mapping: dict) -> tuple:
    stage = mapping.get("stage")
    return (
        mapping.get("pipeline"),
        mapping.get("seed"),
        stage.get("name") if isinstance(stage, dict) else None,
    )


def is_interrupted(run: RunFolder) -> bool:
    """Unfinished, and nobody is at it: while another config's run goes on, a second one may run beside it."""
    try:
        check_not_running(run)
    except EnvironmentProblem:
        return False
    return not run.record.exists()


def has_something_to_lose(run: RunFolder) -> bool:
    """Whether a run has a checkpoint or samples, unless its stage only measures and makes both again."""
    if STAGE_TYPES.get(read_json(run.config)["stage"]["name"]) is EvaluateConfig:
        return False
    return checkpoints.holds_work(run)


def refusal(placed: RunPlan, in_recipe: bool) -> ConfigError:
    """One line: which run, what differs, and both ways on."""
    steps = checkpoints.steps(placed.run.checkpoints)
    where = f"at step {steps[-1]}" if steps else "sampling"
    anew = "pipeline=NAME starts another reproduction" if in_recipe else "--fresh starts a new run"
    decisive = [change for change in placed.changed if not change.allowed]
    return ConfigError(
        f"{placed.run.run_id} is half done ({where}) with another config: {listed(decisive)}; "
        f"give the old values and it goes on, or {anew}"
    )


def new_run_id(config: RunConfig) -> str:
    """Sorts by time within a stage and seed: grpo-s0-20261123-211502-ab12."""
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{run_id_prefix(config)}{now}-{secrets.token_hex(2)}"


def run_id_prefix(config: RunConfig) -> str:
    return f"{config.stage.name}-s{config.seed}-"
