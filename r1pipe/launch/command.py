"""What a stage is launched with: its run folder, its environment, DeepSpeed's command."""

import hashlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any, BinaryIO, NoReturn

from r1pipe.config import RunConfig, config_hash, to_mapping
from r1pipe.config.changes import Change, changes
from r1pipe.config.sampler import check_vllm
from r1pipe.core.launchers import without_place
from r1pipe.core.paths import RunFolder, stages_dir
from r1pipe.core.redaction import publishable
from r1pipe.launch import hosts
from r1pipe.plan import footprint
from r1pipe.runs import machine
from r1pipe.runs.files import read_json, write_json, write_text
from r1pipe.runs.locks import LAUNCH
from r1pipe.runs.record import note

# OpenMP's threads spin for 20 ms before they sleep. With other processes beside, they take processors from
# the threads that they wait for, and a training step takes several times as long. So they spin for .1 ms.
WAITING = "GOMP_SPINCOUNT"
SPINS = "2000"


def command(config: RunConfig, run: RunFolder, launcher: str = "deepspeed") -> list[str]:
    """What starts the ranks of the stage's script, with its run folder."""
    engine = config.engine
    if engine.has_agents:
        return hosts.agents_line(engine, run)
    if engine.launcher == "openmpi":
        options = hosts.mpi_options(engine)
    else:
        port = engine.master_port or free_port()
        options = ["--num_accelerators", str(engine.ranks), "--master_port", str(port)]
    script = stages_dir() / config.stage.script
    return [launcher, "--no_local_rank", *options, str(script), str(run.path)]


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def checked_command(config: RunConfig, run: RunFolder) -> list[str]:
    """The command. Raises EnvironmentProblem where the machine lacks what it needs."""
    line = command(config, run, machine.find_launcher(config.engine))
    footprint.check_disk_space(config, run)
    check_vllm(config.sampler, config.engine)
    return line


def shown_variables(config: RunConfig) -> dict[str, str]:
    """The variables that are part of the command as a user reads it."""
    engine = config.engine
    threads = engine.threads or max(1, machine.cores() // engine.ranks)
    variables = {"OMP_NUM_THREADS": str(threads), **waiting()}
    if engine.accelerator != "auto":
        variables["DS_ACCELERATOR"] = engine.accelerator
    return variables


def waiting() -> dict[str, str]:
    """How OpenMP's threads wait, unless the user's own variables say it."""
    return {} if "OMP_WAIT_POLICY" in os.environ else {WAITING: os.environ.get(WAITING, SPINS)}


@contextmanager
def job_environment(config: RunConfig, line: list[str], token: str | None = None) -> Iterator[dict[str, str]]:
    """The variables that the command `line` runs in, where `import mlflow` fails for the length of the block;
    `token`: of the launch (runs.locks).

    Jobs never use it, but DeepSpeed's tuner imports it wherever it can, which costs each of the launcher's
    processes more than a second; and DeepSpeed would log a tracker's password for other machines.
    """
    around = without_place(os.environ)  # of a scheduler's job, whose task this command may be
    inherited = {name: value for name, value in around.items() if not name.startswith("MLFLOW_")}
    launch = {} if token is None else {LAUNCH: token}
    with tempfile.TemporaryDirectory(prefix="r1pipe-") as folder:
        Path(folder, "mlflow.py").write_text('raise ImportError("jobs write metrics.jsonl, not MLflow")\n')
        paths = {"PATH": machine.search_path(), "PYTHONPATH": os.pathsep.join([folder, module_path()])}
        place = hosts.meeting_place(config.engine, line)
        variables = {**inherited, **shown_variables(config), **paths, **launch, **place}
        variables |= hosts.ssh_variables(config.engine, variables)
        yield {**variables, **hosts.write_variables(config.engine, variables, Path(folder))}


def module_path() -> str:
    """PYTHONPATH with this r1pipe first: a checkout need not be installed."""
    return os.pathsep.join(filter(None, [hosts.package_folder(), os.environ.get("PYTHONPATH")]))


def write_run_files(config: RunConfig, run: RunFolder, line: list[str], sweep: str = "") -> list[Change]:
    """Write config.json, command.txt, env.json and code.diff; how the code and versions differ from those of
    the run's last session, whose diff is kept."""
    run.create()
    if sweep:
        write_text(run.sweep, sweep)
    write_json(run.config, publishable(to_mapping(config)), indent=2)
    devices = machine.devices(config.engine)
    env = {**machine.facts(), "devices": devices, "config_hash": config_hash(config)}
    diff, before, changed = machine.code_diff(), read_json(run.env), []
    if before and run.launcher_log.exists():  # else nothing has run yet
        old_diff = run.diff.read_bytes() if run.diff.exists() else b""
        old, new = facts_of_code(before, old_diff), facts_of_code(env, diff.encode())
        changed = changes(old, new)
        if old["code"] != new["code"] and old_diff:
            copyfile(run.diff, run.earlier_diff(old["code"]["diff_hash"]))
        note(run, changed)
    write_json(run.env, env, indent=2)
    run.diff.write_text(diff, encoding="utf-8")
    run.command.write_text(printable(config, line) + "\n", encoding="utf-8")
    return changed


def facts_of_code(env: Mapping[str, Any], diff: bytes) -> dict[str, Any]:
    """What env.json and the diff say of the code that a session runs."""
    revision = (env.get("code") or {}).get("revision")
    code = {"revision": revision, "diff_hash": hashlib.sha256(diff).hexdigest()}
    return {"code": code, "python": env.get("python"), "versions": env.get("versions")}


def printable(config: RunConfig, line: list[str]) -> str:
    """The command as a user can run it in a shell."""
    variables = [f"{name}={value}" for name, value in shown_variables(config).items()]
    return " ".join([*variables, shlex.join(line)])


def script(name: str, arguments: list[str], log: BinaryIO | None = None) -> int:
    """Run a script of stages/ that needs no launcher, on this terminal or into a log; its exit code."""
    line = [sys.executable, str(stages_dir() / name), *arguments]
    variables = {**without_place(os.environ), **waiting(), "PYTHONPATH": module_path()}
    return subprocess.run(line, env=variables, stdout=log, stderr=log, check=False).returncode


def become_script(name: str, options: BinaryIO) -> NoReturn:
    """Run a script of stages/ in place of this process, so that signals reach it.

    `options`: the open file of its options."""
    os.set_inheritable(options.fileno(), True)
    line = [sys.executable, str(stages_dir() / name), f"/dev/fd/{options.fileno()}"]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    variables = {**without_place(os.environ), **waiting(), "PYTHONPATH": module_path()}
    os.execve(line[0], line, variables)


def on_ranks(name: str, config: RunConfig, run: RunFolder, log: BinaryIO) -> int:
    """Run a script of stages/ as the stage's own job would run, on this machine's ranks; its exit code.

    Raises EnvironmentProblem if the machine lacks something.
    """
    engine = replace(config.engine, launcher="local", hostfile=None, slurm=None)
    stage = replace(config.stage, script=name)
    config = replace(config, engine=engine, stage=stage)
    line = command(config, run, machine.find_launcher(engine))
    with job_environment(config, line) as variables:
        return subprocess.run(
            line, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        ).returncode
