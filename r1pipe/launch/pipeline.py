"""The graph of stages: run one, or all of a recipe; `run_plan` says what happens to each stage's run.

The edges are `starts_from` (weights) and `reads` (data) in conf/stage/*.yaml.
"""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from r1pipe.config import HFConfig, ParentRef, RunConfig, to_mapping
from r1pipe.config.changes import listed
from r1pipe.config.compose import compose
from r1pipe.config.run import WITH_DOCUMENTS
from r1pipe.core.errors import CheckpointError, ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.launch import parents, slurm
from r1pipe.launch.command import checked_command, command, printable, write_run_files
from r1pipe.launch.job import Job, failure
from r1pipe.launch.run_plan import Action, RunPlan, plan_run
from r1pipe.plan import footprint
from r1pipe.runs import data_files, lineage, locks, machine, results
from r1pipe.runs.harness_tasks import check_tasks
from r1pipe.runs.judge_quality import check_judge
from r1pipe.runs.reward_model_quality import check_quality
from r1pipe.runs.servers import check_servers
from r1pipe.tracking import Mirror, check_server_answers, store_uri


def dry_run(config: RunConfig, fresh: bool) -> str:
    """The command, without running it. Writes a new run's folder, and changes none that exists.

    Prints what memory and disk the run would take, and what is missing: a parent, a GPU, disk space.
    """
    try:
        filled = parents.with_parents(config)
    except CheckpointError as error:
        if config.parent is not None or config.teacher is not None:
            raise
        log(f"note: {error}")
        # parents that name a stage but no checkpoint, so that no job can start from them
        start = config.stage.starts_from
        weights = ParentRef(start, "", "", "") if start else None
        reads = {name: ParentRef(name, "", "", "") for name in config.stage.reads}
        filled = replace(config, weights_from=weights, reads_from=reads)
    plan = plan_run(filled, fresh)
    if plan.action is Action.SKIP:
        return plan.describe()
    if plan.action is Action.EXTEND:
        log(plan.describe())
    launcher = "deepspeed"
    try:
        launcher = machine.find_launcher(config.engine)
        footprint.check_disk_space(config, plan.run)
    except EnvironmentProblem as error:
        log(f"note: {error}")
    for name, needs in footprint.estimates(config).items():
        log(f"{name}: {needs}")
    line = command(plan.config, plan.run, launcher)
    if plan.action is Action.START:
        write_run_files(plan.config, plan.run, line)
    if plan.config.engine.launcher == "slurm" and not slurm.is_inside():
        return slurm.script(plan.config, plan.run).rstrip()
    return printable(plan.config, line)


def run_stage(plan: RunPlan) -> int:
    """Run one planned stage to its end; the job's exit code. Raises EnvironmentProblem.

    Where it had finished and its command was killed, do what that left: MLflow, and the lock.
    """
    if plan.action is not Action.SKIP:
        code = start(plan).end()
        if code:
            log(failure(plan.run, code))
        return code
    log(f"{plan.describe()}; its command was killed before it could say so (--fresh starts a new run)")
    try:
        Mirror(plan.run.path, to_mapping(plan.config), log).finish()
    except EnvironmentProblem as error:  # the stage is done all the same
        log(f"{error}; `r1pipe sync` brings MLflow up to date")
    plan.run.pid.unlink(missing_ok=True)
    return 0


def start(plan: RunPlan) -> Job | slurm.Submitted:
    """Start the stage's job, or attach to it where the same command has started it; follow it until its
    record exists or it has failed.

    Raises, before anything is written, CheckpointError where its reward models or its judge are too weak,
    DataError where its data is missing, and EnvironmentProblem, also where a server that it asks is not there
    (Slurm's machines may reach others than this one).
    """
    run_id = plan.run.run_id
    if plan.config.tracking.enabled:
        check_server_answers(store_uri(plan.config.root, plan.config.tracking.uri))
    if plan.config.engine.launcher == "slurm" and not slurm.is_inside():
        return submitted(plan)
    holder = locks.job_of(plan.run)
    if holder and plan.is_same_job:
        log(f"{run_id}: is already running (process {holder.processes[1][0]} since {holder.since})")
        job = Job(plan.config, plan.run)
        job.attach(holder)
        role = "this one follows it, too"
        if job.is_owner:
            role = "its command is gone, and this one takes over"
        log(f"{run_id}: {role}; Ctrl-C stops the job (--fresh starts another)")
    else:
        check_quality(plan.config)
        check_judge(plan.config)
        if plan.config.data.kind == "files" and plan.config.engine.launcher == "local":
            data_files.check_there(asdict(plan.config.data))
        check_tasks(plan.config.benchmark)
        check_servers(plan.config, plan.run)
        locks.check_not_running(plan.run)
        description = plan.describe()  # of the state before the job
        job = Job(plan.config, plan.run)
        changed_code = job.start(plan.changed, plan.sweep)
        log(description)
        if changed_code:
            kept = plan.run.config_history.name
            log(f"{run_id}: code or packages have changed: {listed(changed_code)} (kept in {kept})")
    job.follow()
    return job


def submitted(plan: RunPlan) -> slurm.Submitted:
    """Give the stage to Slurm, or find it there, and follow it. Raises what `start` raises."""
    config, run = plan.config, plan.run
    number = slurm.job_of(run)
    if number is not None and not plan.is_same_job:
        raise EnvironmentProblem(
            f"{run.run_id} is in Slurm's queue (job {number}) with another config: {listed(plan.changed)}; "
            f"scancel {number}, or start another: --fresh"
        )
    if number is None:
        check_quality(config)
        check_judge(config)
        locks.check_not_running(run)
        line = checked_command(config, run)
        run.error.unlink(missing_ok=True)
        write_run_files(config, run, line, plan.sweep)
        number = slurm.submit(config, run)
        log(f"{plan.describe()}, as Slurm's job {number}")
    log(f"{run.run_id}: this command follows Slurm's job {number}; Ctrl-C lets go of it")
    job = slurm.Submitted(config, run, number)
    job.follow()
    return job


def configs_of(overrides: list[str]) -> list[RunConfig]:
    """The configs of the recipe's stages, then of its controls. Raises ConfigError.

    A control that data or model cannot serve is left out, with a note. `parent=` applies to the first stage
    alone.
    """
    for line in overrides:
        if line.startswith("stage="):
            raise ConfigError(
                f"reproduce runs every stage of the recipe; drop {line} or use `r1pipe run {line}`"
            )
    first = compose(overrides).config
    controls = first.recipe.controls
    is_hf = isinstance(first.model, HFConfig)
    if "pretrain" in controls and (is_hf or first.data.kind != WITH_DOCUMENTS):
        why = "model=hf has its weights" if is_hf else f"data={first.data.name} has no documents"
        log(f"note: control pretrain is left out: {why}")
        controls = [name for name in controls if name != "pretrain"]
    names = [*first.recipe.stages, *controls]
    configs = [compose([*overrides, f"stage={name}"]).config for name in names]
    return [configs[0], *(replace(config, parent=None) for config in configs[1:])]


def finished_run_ids(config: RunConfig) -> list[str]:
    """The newest finished run of each stage, for every seed of this recipe under the root."""
    root = Path(config.root)
    runs = [run for run in results.finished_runs(root) if run.recipe.get("name") == config.recipe.name]
    pipelines = sorted({run.config["pipeline"] for run in runs})
    return [run.folder.run_id for name in pipelines for run in results.choose(root, None, name)]


@dataclass
class Outcome:
    config: RunConfig  # of its last stage
    code: int  # 0, or the exit code of the job that failed
    finished: list[RunFolder]  # in the recipe's order
    worked: bool  # whether any job ran


def reproduce(overrides: list[str]) -> Outcome:
    """Run the recipe: skip finished stages, resume unfinished ones. Raises R1pipeError.

    A stage starts as soon as the record of the one before exists, while that one's launcher still exits.
    """
    configs = configs_of(overrides)
    names = [config.stage.name for config in configs]
    checkpoints: dict[str, ParentRef] = {}
    finished: list[RunFolder] = []
    with ThreadPoolExecutor(1) as pool:
        exit_codes: list[Future[int]] = []
        for i, config in enumerate(configs):
            plan = plan_run(parents.with_parents(config, checkpoints, names[i:]), in_recipe=True)
            if plan.action is not Action.SKIP:
                job = start(plan)
                exit_codes.append(pool.submit(job.end))
                if job.received_signal or not plan.done:
                    code = exit_codes[-1].result() or 128 + job.received_signal
                    log(failure(plan.run, code))
                    return Outcome(config, code, finished, worked=True)
                if not job.is_owner:
                    log(f"{plan.run.run_id}: is done; the command that started it continues with the rest")
                    return Outcome(config, exit_codes[-1].result(), [*finished, plan.run], worked=False)
            elif not plan.is_bit_exact:
                log(plan.describe())
            checkpoints[config.stage.name] = lineage.checkpoint_of_run(plan.run)
            finished.append(plan.run)
        code = max((future.result() for future in exit_codes), default=0)
        return Outcome(configs[-1], code, finished, worked=bool(exit_codes))


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
