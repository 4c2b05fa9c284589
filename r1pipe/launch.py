"""One stage as one DeepSpeed job: write its run folder, start the launcher, follow it, tell how it ended."""

import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import psutil

import r1pipe
from r1pipe import machine
from r1pipe.config import config_hash, to_mapping
from r1pipe.config.schema import RunConfig
from r1pipe.errors import EnvironmentProblem
from r1pipe.paths import RunFolder, stages_dir
from r1pipe.progress import Display
from r1pipe.tracking import Mirror

POLL_S = 0.1
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = tuple(128 + number for number in PASSED_ON)
GRACE_S = 20.0  # from the forwarded signal to SIGKILL
TAIL = 15  # lines of the log shown when a job fails without a line of its own


def command(config: RunConfig, run: RunFolder, launcher: str = "deepspeed") -> list[str]:
    """DeepSpeed's launcher with the stage's script and its run folder."""
    engine = config.engine
    arguments = [
        "--no_local_rank",
        "--num_accelerators",
        str(engine.ranks),
        "--master_port",
        str(free_port()),
    ]
    if engine.hostfile is not None:
        arguments += ["--hostfile", engine.hostfile, "--launcher", engine.launcher]
    script = stages_dir() / config.stage.script
    return [launcher, *arguments, str(script), str(run.path)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def environment(config: RunConfig) -> dict[str, str]:
    """What the job needs beside the user's own environment."""
    engine = config.engine
    threads = engine.threads or max(1, machine.cores() // engine.ranks)
    added = {"OMP_NUM_THREADS": str(threads), "PATH": machine.search_path(), "PYTHONPATH": module_path()}
    if engine.accelerator != "auto":
        added["DS_ACCELERATOR"] = engine.accelerator
    return added


def module_path() -> str:
    """PYTHONPATH with this r1pipe first: a checkout need not be installed."""
    package = str(Path(r1pipe.__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))


def prepare(config: RunConfig, run: RunFolder) -> list[str]:
    """Write config.json, command.txt and env.json; the command. Raises EnvironmentProblem."""
    line = command(config, run, machine.must_launch(config.engine))
    run.path.parent.mkdir(parents=True, exist_ok=True)
    machine.must_have_room(config)
    run.log.mkdir(parents=True, exist_ok=True)
    write_json(run.config, to_mapping(config))
    write_json(run.env, {**machine.facts(), "config_hash": config_hash(config)})
    run.command.write_text(printable(config, line) + "\n", encoding="utf-8")
    return line


def printable(config: RunConfig, line: list[str]) -> str:
    """The command as a user can run it in a shell."""
    shown = ("OMP_NUM_THREADS", "DS_ACCELERATOR")
    added = [f"{name}={value}" for name, value in environment(config).items() if name in shown]
    return " ".join([*added, shlex.join(line)])


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def script(name: str, arguments: list[str], log: BinaryIO | None = None) -> int:
    """Run a script of stages/ that needs no launcher, on this terminal or into a log; its exit code."""
    line = [sys.executable, str(stages_dir() / name), *arguments]
    variables = {**os.environ, "PYTHONPATH": module_path()}
    return subprocess.run(line, env=variables, stdout=log, stderr=log, check=False).returncode


def on_ranks(name: str, config: RunConfig, run: RunFolder, log: BinaryIO) -> int:
    """Run a script of stages/ as the stage's own job would run, on this machine's ranks; its exit code.

    Raises EnvironmentProblem if the machine lacks something.
    """
    engine, stage = replace(config.engine, hostfile=None), replace(config.stage, script=name)
    here = replace(config, engine=engine, stage=stage)
    line = command(here, run, machine.must_launch(engine))
    with no_mlflow() as hidden:
        variables = {**os.environ, **environment(here)}
        variables["PYTHONPATH"] = os.pathsep.join([hidden, variables["PYTHONPATH"]])
        ended = subprocess.run(
            line, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    return ended.returncode


class Job:
    """A stage's DeepSpeed job, from its start until its launcher has gone."""

    def __init__(self, config: RunConfig, run: RunFolder):
        """Starts it. Raises EnvironmentProblem if the machine lacks something, or the run is going on."""
        self.run, self._caught, self._killed_at = run, 0, math.inf
        line = prepare(config, run)
        with ExitStack() as stack:
            stack.enter_context(owned(run))
            run.error.unlink(missing_ok=True)
            self.mirror = Mirror(run.path, to_mapping(config))
            variables = {**os.environ, **environment(config)}
            variables["PYTHONPATH"] = os.pathsep.join(
                [stack.enter_context(no_mlflow()), variables["PYTHONPATH"]]
            )
            log = stack.enter_context((run.log / "launcher.txt").open("ab"))
            log.write(f"$ {printable(config, line)}\n".encode())
            log.flush()
            # A session of its own: a Ctrl-C reaches the job once, through us, and so does every other signal.
            self.process = subprocess.Popen(
                line, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            own(run, self.process.pid)
            self.display = Display(run.path, config.stage.name)
            self._held = stack.pop_all()

    def follow(self) -> None:
        """Show and mirror the job until its record is there or it has ended; pass signals on to it."""
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        try:
            while self.process.poll() is None and not self.run.record.exists():
                self.display.poll()
                self.mirror.poll()
                if time.monotonic() > self._killed_at:
                    self._signal(signal.SIGKILL)
                time.sleep(POLL_S)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.display.close()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        self._killed_at = time.monotonic() + GRACE_S
        self._signal(number)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it ended in this moment
            os.killpg(self.process.pid, number)

    def _sweep(self) -> None:
        """Let no rank outlive its launcher: it would go on writing into a run that another may take up."""
        left = group(self.process.pid)
        self._signal(signal.SIGTERM)
        _, stubborn = psutil.wait_procs(left, timeout=GRACE_S)
        if stubborn:
            self._signal(signal.SIGKILL)

    def end(self) -> int:
        """Wait until the launcher has gone and MLflow has everything; the job's exit code."""
        with self._held:
            code = self.process.wait()
            self._sweep()
            self.mirror.finish()
        if self._caught:
            return 128 + self._caught
        if code == 0 and not self.run.record.exists():
            return 1  # DeepSpeed's launcher forgets when its child was killed
        return code if code >= 0 else 128 - code


def group(leader: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def failure(run: RunFolder, code: int) -> str:
    """What to tell about a failed job: the line it left for the user, or else the end of its log."""
    if code in INTERRUPTED:
        return f"{run.run_id} was interrupted; the same command goes on with it"
    if run.error.exists():
        return run.error.read_text(encoding="utf-8").strip()
    log = run.log / "launcher.txt"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if told(line)]
    return "\n".join([*lines[-TAIL:], f"the job ended with exit code {code}; its whole log: {log}"])


def told(line: str) -> bool:
    """Whether a line comes from the job: DeepSpeed's launcher marks its own with a date in brackets."""
    return bool(line.strip()) and not line.startswith("[20")


@contextmanager
def no_mlflow() -> Iterator[str]:
    """A folder for PYTHONPATH where `import mlflow` fails: jobs never use it, but DeepSpeed's tuner imports
    it wherever it is found, which costs each of the launcher's processes more than a second."""
    with tempfile.TemporaryDirectory(prefix="r1pipe-") as folder:
        Path(folder, "mlflow.py").write_text('raise ImportError("jobs write metrics.jsonl, not MLflow")\n')
        yield folder


@contextmanager
def owned(run: RunFolder) -> Iterator[None]:
    """Hold the run's pid file. Raises EnvironmentProblem while another living process does."""
    must_be_free(run)
    run.pid.unlink(missing_ok=True)
    own(run, os.getpid())
    try:
        yield
    finally:
        run.pid.unlink(missing_ok=True)


def must_be_free(run: RunFolder) -> None:
    """Raises EnvironmentProblem while a living process has the run."""
    owner = living_owner(run)
    if owner is not None:
        raise EnvironmentProblem(
            f"run {run.run_id} is going on already (process {owner}); wait for it, or start another: --fresh"
        )


def own(run: RunFolder, pid: int) -> None:
    run.pid.write_text(f"{pid} {psutil.Process(pid).create_time()}\n", encoding="utf-8")


def living_owner(run: RunFolder) -> int | None:
    """The process that has this run; None where it is gone (its number may be another's by now)."""
    if not run.pid.exists():
        return None
    pid, began = run.pid.read_text(encoding="utf-8").split()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(pid))
        if process.create_time() == float(began) and process.status() != psutil.STATUS_ZOMBIE:
            return int(pid)
    return None
