"""The graph of stages: run one, or walk a whole recipe; `placing` finds each stage's run.

The edges are `starts_from` (weights) and `reads` (data) in conf/stage/*.yaml.
"""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from r1pipe.config import ParentRef, RunConfig, to_mapping
from r1pipe.config.changes import listed
from r1pipe.config.compose import compose
from r1pipe.config.run import WITH_DOCUMENTS
from r1pipe.core.errors import CheckpointError, ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.launch import parents
from r1pipe.launch.command import command, printable, write_down
from r1pipe.launch.job import AttachedJob, FollowedJob, Job, failure
from r1pipe.launch.placing import RunPlan, place
from r1pipe.plan import footprint
from r1pipe.runs import lineage, locks, machine, results
from r1pipe.runs import reward_model_quality as judges
from r1pipe.tracking import Mirror, check_tracking


def dry_run(config: RunConfig, fresh: bool) -> str:
    """Start nothing; the command. A new run's folder is written, one that is there already is left as it is.

    It also says what memory and disk the run would take, and what is missing here: a parent that is not made
    yet, a GPU, room on the disk.
    """
    try:
        filled = parents.with_parents(config)
    except CheckpointError as error:
        if config.parent is not None:
            raise
        tell(f"note: {error}")
        filled = parents.with_open_parents(config)
    placed = place(filled, fresh)
    if placed.done:
        return placed.says()
    if placed.extends_from:
        tell(placed.says())
    launcher = "deepspeed"
    try:
        launcher = machine.find_launcher(config.engine)
        footprint.check_disk_space(config, placed.run)
    except EnvironmentProblem as error:
        tell(f"note: {error}")
    for name, needs in footprint.estimates(config).items():
        tell(f"{name}: {needs}")
    line = command(placed.config, placed.run, launcher)
    if placed.is_new:
        write_down(placed.config, placed.run, line)
    return printable(placed.config, line)


def run_stage(placed: RunPlan) -> int:
    """Run one placed stage to its end; the job's exit code. Raises EnvironmentProblem."""
    if placed.done:
        make_up(placed)
        return 0
    job = start(placed)
    code = job.end()
    if code:
        tell(failure(placed.run, code))
    return code


def make_up(placed: RunPlan) -> None:
    """What the command that ran a finished stage had left to do when it was killed: MLflow, and its lock."""
    tell(f"{placed.says()}; its command was cut off after that (--fresh starts anew)")
    try:
        Mirror(placed.run.path, to_mapping(placed.config), tell).finish()
    except EnvironmentProblem as error:  # the stage is done all the same
        tell(f"{error}; `r1pipe sync` makes up for it")
    placed.run.pid.unlink(missing_ok=True)


def start(placed: RunPlan) -> FollowedJob:
    """Start the stage's job, saying so, or attach to it where the same command has started it; follow it
    until its record is there or it has failed.

    Raises CheckpointError where it would ask reward models that are too weak, DataError where its data is
    missing, and EnvironmentProblem, before anything is said or written.
    """
    check_tracking(placed.config)
    holder = locks.job_of(placed.run)
    if holder and placed.is_same_job:
        tell(
            f"{placed.run.run_id}: is running already (process {holder.processes[1][0]} since {holder.since})"
        )
        attached = AttachedJob(placed.config, placed.run, holder)
        then = (
            "its command is gone, and this one takes over"
            if attached.is_owner
            else "this one follows it, too"
        )
        tell(f"{placed.run.run_id}: {then}; Ctrl-C stops the job (--fresh starts another)")
        attached.follow()
        return attached
    judges.check_quality(placed.config)
    machine.check_data_files(placed.config)
    locks.check_not_running(placed.run)
    says = placed.says()
    job = Job(placed.config, placed.run, placed.changed, placed.sweep)
    tell(says)
    if job.changed_code:
        kept = placed.run.config_history.name
        tell(f"{placed.run.run_id}: with other code than before: {listed(job.changed_code)} (kept in {kept})")
    job.follow()
    return job


def configs_of(overrides: list[str]) -> list[RunConfig]:
    """The recipe's stages, then its controls, all composed before anything runs. Raises ConfigError."""
    for line in overrides:
        if line.startswith("stage="):
            raise ConfigError(
                f"reproduce walks every stage of the recipe; drop {line} or use `r1pipe run {line}`"
            )
    first = compose(overrides).config
    names = [*first.recipe.stages, *controls_of(first)]
    configs = [compose([*overrides, f"stage={name}"]).config for name in names]
    # What the user brings with parent= is where the recipe starts; every later stage has its own parent.
    return [configs[0], *(replace(config, parent=None) for config in configs[1:])]


def controls_of(config: RunConfig) -> list[str]:
    """The recipe's controls, but for one that the data cannot serve; says so."""
    controls = config.recipe.controls
    if "pretrain" in controls and config.data.kind != WITH_DOCUMENTS:
        tell(f"note: control pretrain is left out: data={config.data.name} has no documents")
        return [name for name in controls if name != "pretrain"]
    return controls


def runs_of_recipe(config: RunConfig) -> list[str]:
    """The newest finished run of each stage, for every seed of this recipe under the root."""
    root = Path(config.root)
    same = [run for run in results.finished_runs(root) if run.recipe.get("name") == config.recipe.name]
    pipelines = sorted({run.config["pipeline"] for run in same})
    return [run.folder.run_id for name in pipelines for run in results.choose(root, None, name)]


@dataclass
class Outcome:
    """How far a reproduction came."""

    config: RunConfig  # of its last stage
    code: int  # 0, or the exit code of the job that failed
    finished: list[RunFolder]  # in the recipe's order
    worked: bool  # whether any job ran


def reproduce(overrides: list[str]) -> Outcome:
    """Walk the recipe: skip what is done, go on with what is half done. Raises R1pipeError.

    A stage starts as soon as the last one's record is there: the last one's launcher winds down meanwhile.
    """
    configs = configs_of(overrides)
    made: dict[str, ParentRef] = {}
    finished: list[RunFolder] = []
    with ThreadPoolExecutor(1) as winding_down:
        ends: list[Future[int]] = []
        names = [config.stage.name for config in configs]
        for i, config in enumerate(configs):
            placed = place(parents.with_parents(config, made, names[i:]), in_recipe=True)
            if placed.done and not placed.same_bits:
                tell(placed.says())
            if not placed.done:
                job = start(placed)
                ends.append(winding_down.submit(job.end))
                if job.caught or not placed.done:
                    code = ends[-1].result() or 128 + job.caught
                    tell(failure(placed.run, code))
                    return Outcome(config, code, finished, worked=True)
                if not job.is_owner:
                    tell(f"{placed.run.run_id}: is done; the command that started it goes on with the rest")
                    return Outcome(config, ends[-1].result(), [*finished, placed.run], worked=False)
            made[config.stage.name] = lineage.checkpoint_of_run(placed.run)
            finished.append(placed.run)
        code = max((end.result() for end in ends), default=0)
        return Outcome(configs[-1], code, finished, worked=bool(ends))


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
