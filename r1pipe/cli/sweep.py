"""`r1pipe run --multirun`: one of Hydra's sweepers chooses the overrides, and each job is a stage's run.

The jobs run in this process, one after another. A job that fails ends the sweep, as Hydra's launchers do.
"""

import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from r1pipe.cli import compare
from r1pipe.config.compose import compose
from r1pipe.config.groups import with_stage
from r1pipe.config.overrides import first_line, parse
from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import conf_dir
from r1pipe.core.redaction import without_secrets
from r1pipe.launch import parents, pipeline
from r1pipe.launch.job import failure
from r1pipe.runs import results
from r1pipe.runs.record import record_of

Task = Callable[[list[str]], float | None]  # overrides of a job -> what an optimizing sweeper gets
OF_HYDRA = re.compile(r"[+~]*hydra[./]")  # overrides of the sweeper, not of a run


@dataclass(frozen=True)
class InThisProcess:
    """Stands in for Hydra's launchers: calls the task with each job's overrides, one after another."""

    task: Task

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        return [
            JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=self.task(list(overrides)))
            for overrides in job_overrides
        ]


class CheckingLoader(ConfigLoaderImpl):
    """Lets a sweeper check the jobs before the first one starts."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        compose(sweep_overrides)
        return master_config


class JobFailed(Exception):
    """Ends a sweep; its argument is the job's exit code."""


def sweep(overrides: list[str], fresh: bool = False, dry_run: bool = False) -> int:
    """Run the sweep's jobs and show their table; 0, or the exit code of the job that failed.

    A config that has a run already gets no second one: that run is skipped if it has finished, and resumed if
    not. `dry_run` prints the jobs' commands instead. Raises R1pipeError.
    """
    own = [word for word in with_stage(overrides) if not OF_HYDRA.match(word)]
    words = [word for word in own if not word.startswith(("root=", "tracking"))]
    # the same for the same command, so that MLflow shows a sweep that was interrupted as one
    name = without_secrets(f"sweep {shlex.join(words)}")
    finished: dict[str, str] = {}  # run folder -> its root

    def print_command(job: list[str]) -> None:
        print(shlex.join(["r1pipe", "run", *job]))

    def run(job: list[str]) -> float | None:
        config = parents.with_parents(compose(job).config)
        plan = pipeline.plan_run(config, fresh, sweep=name)
        if plan.done:
            pipeline.log(plan.describe())
        else:
            started = pipeline.start(plan)
            code = started.end()
            if not plan.done:
                pipeline.log(failure(plan.run, code))
            if code or started.received_signal:
                raise JobFailed(code or 128 + started.received_signal)
        finished[str(plan.run.path)] = config.root
        return record_of(plan.run)["metrics"].get("pass_at_1")

    try:
        hand_to_sweeper(print_command if dry_run else run, own, [*filter(OF_HYDRA.match, overrides)])
        return 0
    except JobFailed as failed:
        return int(failed.args[0])
    finally:
        if finished:
            compare.show(results.rows([*finished.values()][-1], [*finished]))


def hand_to_sweeper(task: Task, overrides: list[str], of_hydra: list[str]) -> None:
    """Let the sweeper that `of_hydra` chooses call `task` with the overrides of each job.

    Raises ConfigError where the sweeper is not installed or refuses the overrides.
    """
    plugins = Plugins.instance()
    launcher = InThisProcess(task)  # every sweeper asks for its launcher in this way
    plugins.instantiate_launcher = lambda **_: launcher  # type: ignore[method-assign, assignment]
    arguments = [str(override.input_line) for override in parse(overrides)]
    try:
        with tempfile.TemporaryDirectory(prefix="r1pipe-") as folder:  # the sweeper writes multirun.yaml
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                settings = [f"hydra.sweep.dir={folder}", *of_hydra]
                config = hydra_compose("config", settings, return_hydra_config=True)
                loader = CheckingLoader(GlobalHydra.instance().config_loader().get_search_path())
            sweeper = plugins.instantiate_sweeper(
                hydra_context=HydraContext(loader, Callbacks()), task_function=task, config=config
            )
            sweeper.sweep(arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot sweep: {first_line(error)}") from None
