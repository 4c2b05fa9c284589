"""Which run folder a config belongs to: an unfinished run's that goes on, a finished one's, or a new one."""

import secrets
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from r1pipe.cli.compare import read_json
from r1pipe.config import STAGE_TYPES, EvaluateConfig, RunConfig, to_mapping
from r1pipe.config.changes import Change, changes, listed
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable
from r1pipe.runs import checkpoints, lineage
from r1pipe.runs.locks import check_not_running, was_interrupted


@dataclass(frozen=True)
class RunPlan:
    """A stage's config with its parents, and the run folder it belongs to."""

    config: RunConfig
    run: RunFolder
    is_new: bool
    changed: tuple[Change, ...] = ()  # since the run was launched last

    @property
    def done(self) -> bool:
        return self.run.record.exists()

    @property
    def same_bits(self) -> bool:
        return all(change.same_bits for change in self.changed)

    @property
    def fits(self) -> bool:
        return all(change.allowed for change in self.changed)

    def says(self) -> str:
        """One line for the user on what is about to happen."""
        if self.is_new:
            return f"{self.run.run_id}: starts"
        if self.done:
            other = f", with other values: {listed(self.changed)}" if not self.same_bits else ""
            return f"{self.run.run_id}: is done already{other}"
        steps = checkpoints.steps(self.run.checkpoints)
        where = f"from step {steps[-1]}" if steps else "from its beginning, as it has no checkpoint yet"
        changed = f" with {listed(self.changed)}" if self.changed else ""
        return f"{self.run.run_id}: goes on {where}{changed} (--fresh starts anew)"


def place(config: RunConfig, fresh: bool = False, in_recipe: bool = False) -> RunPlan:
    """Where the stage's run is: an unfinished one of this config, or a new one.

    The newest run of the same pipeline, stage and seed, if unfinished, goes on with another config where only
    keys that may change are different. Raises ConfigError where others are and the run has something to lose.
    An older one goes on with its own config alone. `fresh` starts anew; a recipe's walk (`in_recipe`) takes a
    finished run, too, of this config or of one that differs in keys that may change. So does every call where
    the newest run has finished with this config and a kill kept its command from saying so: a scheduler that
    starts the command again does not want the stage again.
    """
    wanted = publishable(to_mapping(config))  # as it stands in config.json
    known = [
        RunPlan(config, run, False, tuple(changes(read_json(run.config), wanted)))
        for run in ([] if fresh else runs_of(config))
    ]
    exact = [placed for placed in known if placed.same_bits]
    done = [placed for placed in [*known, *exact] if placed.fits and placed.done]
    if in_recipe and done:
        return done[-1]
    if known and known[-1].done and known[-1].same_bits and was_interrupted(known[-1].run):
        return known[-1]
    half_done = [placed for placed in [*known[-1:], *exact] if placed.fits and not placed.done]
    if half_done:
        return half_done[-1]
    if known and is_interrupted(known[-1].run) and has_something_to_lose(known[-1].run):
        raise refusal(known[-1], in_recipe)
    return RunPlan(config, RunFolder(Path(config.root).resolve() / new_run_id(config)), is_new=True)


def runs_of(config: RunConfig) -> list[RunFolder]:
    """The runs under the root of this pipeline, stage and seed, oldest first; warns of those that may be one,
    but whose config.json cannot be read."""
    wanted, found = (config.pipeline, config.seed, config.stage.name), []
    for run in lineage.runs(Path(config.root)):
        known = read_json(run.config)
        if known and key_of(known) == wanted:
            found.append(run)
        elif not known and run.run_id.startswith(run_id_prefix(config)):
            print(f"warning: {left_out(run)}", file=sys.stderr, flush=True)
    return found


def unreadable(root: Path) -> list[RunFolder]:
    """Run folders whose config.json is broken: no command knows what they are."""
    return [run for run in lineage.runs(root) if not read_json(run.config)]


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
