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
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import psutil

import r1pipe
from r1pipe.config import RunConfig, config_hash, to_mapping
from r1pipe.config.changes import Change
from r1pipe.core.errors import EnvironmentProblem, warn_once
from r1pipe.core.paths import RunFolder, stages_dir
from r1pipe.core.redaction import publishable
from r1pipe.launch.progress import Display
from r1pipe.launch.watch import Fault, Watch, goes_on
from r1pipe.plan import footprint
from r1pipe.runs import heartbeat, history, locks, machine, processes, stopping
from r1pipe.tracking import Mirror

POLL_S = 0.1
LEAVING_S = 3.0  # from SIGTERM to SIGKILL, where there is nothing to wait for
ENDING_S = 15.0  # for the other ranks, after one has failed: they may wait for it for ever
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


def variables_of(config: RunConfig, hidden: str) -> dict[str, str]:
    """The environment that a job runs in; `hidden` is the folder of `no_mlflow`."""
    # jobs need no tracker, and DeepSpeed would log its password with the command for other machines
    untracked = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    added = environment(config)
    return {**untracked, **added, "PYTHONPATH": os.pathsep.join([hidden, added["PYTHONPATH"]])}


def module_path() -> str:
    """PYTHONPATH with this r1pipe first: a checkout need not be installed."""
    package = str(Path(r1pipe.__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))


def checked(config: RunConfig, run: RunFolder) -> list[str]:
    """The command. Raises EnvironmentProblem where the machine lacks what it needs."""
    line = command(config, run, machine.find_launcher(config.engine))
    run.path.parent.mkdir(parents=True, exist_ok=True)
    footprint.check_disk_space(config, run)
    return line


def write_down(config: RunConfig, run: RunFolder, line: list[str]) -> list[Change]:
    """Write config.json, command.txt, env.json and code.diff; what code and versions the run has gone on with
    until now, where they were others."""
    run.log.mkdir(parents=True, exist_ok=True)
    write_json(run.config, publishable(to_mapping(config)))
    env, diff = {**machine.facts(), "config_hash": config_hash(config)}, machine.code_diff()
    changed = history.note_code(run, env, diff)
    write_json(run.env, env)
    run.diff.write_text(diff, encoding="utf-8")
    run.command.write_text(printable(config, line) + "\n", encoding="utf-8")
    return changed


def printable(config: RunConfig, line: list[str]) -> str:
    """The command as a user can run it in a shell."""
    shown = ("OMP_NUM_THREADS", "DS_ACCELERATOR")
    added = [f"{name}={value}" for name, value in environment(config).items() if name in shown]
    return " ".join([*added, shlex.join(line)])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run whose config.json a kill has cut off would be lost to the next call."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


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
    line = command(here, run, machine.find_launcher(engine))
    with no_mlflow() as hidden:
        variables = variables_of(here, hidden)
        ended = subprocess.run(
            line, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    return ended.returncode


class Job:
    """A stage's DeepSpeed job, from its start until its launcher has gone."""

    def __init__(self, config: RunConfig, run: RunFolder):
        """Starts it. Raises EnvironmentProblem if the machine lacks something, or another job has the run."""
        self.run, self.engine = run, config.engine
        self.caught = 0  # the signal that this process got while it followed the job
        self._told, self._over, self._kill_at, self._leader = False, False, math.inf, 0
        self._fault: Fault | None = None
        line = checked(config, run)
        with ExitStack() as stack, ExitStack() as signals:
            self._lock = stack.enter_context(locks.held(run))
            self.changed_code = write_down(config, run, line)
            for left in (run.error, run.stop):
                left.unlink(missing_ok=True)
            self.mirror = Mirror(run.path, to_mapping(config))
            self.display = Display(run.path, config.stage.name)
            ranks = config.engine.ranks if config.engine.hostfile is None else None
            self.watch = Watch(run, ranks, config.engine.stuck_after_s)
            variables = variables_of(config, stack.enter_context(no_mlflow()))
            log = stack.enter_context(run.launcher_log.open("ab"))
            log.write(f"$ {printable(config, line)}\n".encode())
            log.flush()
            signals.enter_context(stopping.handling(self._pass_on))
            # A session of its own: a Ctrl-C reaches the job once, through us, and so does every other signal.
            self.process = subprocess.Popen(
                line, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            self._leader = self.process.pid
            self._lock.add(self._leader)
            if self.caught:
                self._signal(self.caught)
            self._held, self._signals = stack.pop_all(), signals.pop_all()

    def follow(self) -> None:
        """Show and mirror the job until its record is there or it has ended; pass signals on to it, and end
        it where a rank was killed or is stuck."""
        with self._signals, closing(self.display):
            try:
                while self.process.poll() is None and not self.run.record.exists():
                    self.display.poll()
                    self.mirror.poll()
                    self._lock.renew()
                    self._end_if_due()
                    time.sleep(POLL_S)
            except EnvironmentProblem:  # a tracker that must work at the start does not: no job goes on alone
                self._end_now()
                self._held.close()
                raise

    def _end_if_due(self) -> None:
        if self._over:
            return
        if self.caught and not self._told:
            self._told = True
            self.display.say(
                f"{self.run.run_id}: leaves with a checkpoint, within {self.engine.grace_s:g} s; "
                "the same signal again ends it at once"
            )
        if time.monotonic() > self._kill_at:
            why = f"did not leave within engine.grace_s={self.engine.grace_s:g} and was ended"
            warn_once(self.run.error, f"{self.run.run_id} was interrupted, {why}; {goes_on(self.run)}")
            self._end_now()
        elif self._fault is None and (fault := self.watch.look()):
            self._fault = fault
            warn_once(self.run.error, fault.line)
            self._end_now()
        elif self.watch.failed_for_s() > ENDING_S:
            self._end_now()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to save and leave; at the second time end them."""
        if self.caught:
            self._over = True
            stopping.request(self.run.stop, number, at_once=True)
            self._signal(signal.SIGKILL)
            return
        self.caught, self._kill_at = number, time.monotonic() + self.engine.grace_s
        if heartbeat.read_all(self.run):
            stopping.request(self.run.stop, number)
        else:  # they have not begun: nothing to save
            self._signal(number)

    def _signal(self, number: int) -> None:
        if self._leader:
            with suppress(ProcessLookupError):  # it ended in this moment
                os.killpg(self._leader, number)

    def _end_now(self) -> None:
        self._over = True
        stopping.request(self.run.stop, signal.SIGTERM, at_once=True)
        self._sweep(LEAVING_S)

    def _sweep(self, grace_s: float) -> None:
        """Let no rank outlive its launcher: it would go on writing into a run that another may take up."""
        left = processes.group(self._leader)
        self._signal(signal.SIGTERM)
        _, stubborn = psutil.wait_procs(left, timeout=grace_s)
        if stubborn:
            self._signal(signal.SIGKILL)

    def end(self) -> int:
        """Wait until the launcher has gone and MLflow has everything; the job's exit code."""
        with self._held:
            try:
                code = self.process.wait(self.engine.grace_s)
            except subprocess.TimeoutExpired:
                self._end_now()
                code = self.process.wait()
            self._sweep(self.engine.grace_s)
            if not self.run.record.exists() and not self.caught and not self._fault:
                self._fault = self.watch.last_look(code)
                if self._fault:
                    warn_once(self.run.error, self._fault.line)
            self.run.stop.unlink(missing_ok=True)
            self.mirror.finish()
        return self._exit_code(code)

    def _exit_code(self, launcher: int) -> int:
        """The job's, from that of DeepSpeed's launcher: it forgets what its children were killed by."""
        own = launcher if launcher >= 0 else 128 - launcher
        if self.run.record.exists():
            return own
        if self.caught:
            return 128 + self.caught
        if self._fault:
            return self._fault.code
        failed = [code for code in self.watch.ended.values() if code is not None and code > 0]
        # nobody asked the job to stop: ranks that left by a signal were ended since another one failed
        return min(failed, key=lambda code: code in stopping.EXIT_CODES) if failed else own or 1


def failure(run: RunFolder, code: int) -> str:
    """What to tell about a failed job: the line it left for the user, or else the end of its log."""
    if run.error.exists():
        return run.error.read_text(encoding="utf-8").strip()
    if code in stopping.EXIT_CODES:
        state = "is done" if run.record.exists() else "was interrupted"
        return f"{run.run_id} {state}; {goes_on(run)}"
    log = run.launcher_log
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
