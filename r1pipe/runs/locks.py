"""Locks of run folders: one job at a time, on one machine or on several that share the folder.

The run's pid file names the job's processes: {"host": "node7", "since": "2026-11-25 03:56:34",
"processes": [[4711, 1795492594.1]]}, each with its pid and start time. It is written under `flock`: of two
jobs that start at the same moment one is refused. The lock of dead processes is taken over once none of their
ranks is left: a launcher that was killed leaves ranks behind, which have a heartbeat or are still importing.

Ranks on other machines cannot be looked at. So each launch has a token, in the run folder and in the
variables of its ranks; one whose token is not the folder's neither starts nor saves, and leaves in seconds.
"""

import errno
import fcntl
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO

import psutil

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs import heartbeat, processes
from r1pipe.runs.files import read_json, write_json, write_text
from r1pipe.runs.stopping import repeating

LAUNCH = "R1PIPE_LAUNCH"  # the variable with a launch's token
LEASE_S = 60.0  # a holder on another machine without a heartbeat for so long counts as dead
RENEW_S = 10.0
LOOK_S = 1.0  # how often a rank looks whether its run was taken over
TAKEN_CODE = 2  # exit code
OVER = "over"  # after the token of a launch that has ended

log = logging.getLogger("r1pipe")


class Taken(EnvironmentProblem):
    """Another job holds the run: nothing may be written into its folder."""


@dataclass
class Holder:
    """The content of the pid file."""

    host: str = ""
    since: str = ""
    processes: list[tuple[int, float]] = field(default_factory=list)  # pid, start time

    @classmethod
    def read(cls, path: Path) -> "Holder":
        """Empty if the file is missing or damaged."""
        content = read_json(path)
        try:
            pairs = [(int(pid), float(began)) for pid, began in content["processes"]]
            return cls(str(content["host"]), str(content["since"]), pairs)
        except (ValueError, TypeError, KeyError):
            return cls()

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def live_launchers(self) -> list[int]:
        """Pids of its own processes on this machine: r1pipe and DeepSpeed's runner."""
        return [pid for pid, began in self.processes if self.is_here and processes.is_alive(pid, began)]

    def write(self, path: Path) -> None:
        write_json(path, asdict(self), indent=None)


class Lock:
    """A run that this process holds; see `held`."""

    def __init__(self, run: RunFolder):
        self.run = run
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self.holder = Holder(socket.gethostname(), now)
        self.token = secrets.token_hex(8)  # of the launch
        self._renewed = time.monotonic()

    def take(self) -> None:
        """Raises EnvironmentProblem if another job holds the run."""
        self.run.create()
        with _guarded(self.run):
            check_not_running(self.run)
            for beat in self.run.log.glob(f"{RunFolder.HEARTBEAT}*"):  # of ranks that are dead
                beat.unlink(missing_ok=True)
            self.add(os.getpid())
            write_text(self.run.launch, self.token)

    def add(self, pid: int) -> None:
        """Add a process of the job: the run is free once all of them are gone."""
        self.holder.processes.append((pid, processes.began(pid)))
        self.holder.write(self.run.pid)

    def renew(self) -> None:
        """Show other machines that the job is alive; cheap enough to call often."""
        if time.monotonic() - self._renewed > RENEW_S:
            self._renewed = time.monotonic()
            self.holder.write(self.run.pid)

    def release(self) -> None:
        with suppress(FileNotFoundError), _guarded(self.run):  # a folder that was moved took its lock along
            if Holder.read(self.run.pid) == self.holder:
                self.run.pid.unlink()


def end_launch(run: RunFolder) -> None:
    """For the run's holder: its ranks on other machines that are out of sight leave, and save nothing."""
    with _guarded(run):
        token = token_of(run)
        if token and not token.endswith(f" {OVER}"):
            write_text(run.launch, f"{token} {OVER}")


@contextmanager
def held(run: RunFolder) -> Iterator[Lock]:
    """Hold a run for the length of a block. Raises EnvironmentProblem if another job holds it."""
    lock = Lock(run)
    lock.take()
    try:
        yield lock
    finally:
        lock.release()


def job_of(run: RunFolder) -> Holder | None:
    """The holder of a run whose launcher or ranks are alive on this machine."""
    holder = Holder.read(run.pid)
    if not holder.is_here or len(holder.processes) < 2:
        return None
    return holder if processes.is_alive(*holder.processes[1]) or live_ranks(run, holder) else None


def adopt(run: RunFolder) -> Lock | None:
    """Take the run of a command that died while its job runs; None if another command holds it."""
    lock = Lock(run)
    with _guarded(run):
        holder = Holder.read(run.pid)
        if not holder.is_here or processes.is_alive(*holder.processes[0]):
            return None
        own = (os.getpid(), processes.began(os.getpid()))
        lock.holder = replace(holder, processes=[own, *holder.processes[1:]])
        lock.holder.write(run.pid)
    return lock


def check_not_running(run: RunFolder) -> None:
    """Raises EnvironmentProblem if another job holds the run, naming its process."""
    holder = Holder.read(run.pid)
    since = f" on {holder.host} since {holder.since}" if holder.host else ""
    if launchers := holder.live_launchers():
        raise EnvironmentProblem(
            f"run {run.run_id} is already running (process {launchers[-1]}{since}); "
            "wait for it, or start another: --fresh"
        )
    if ranks := live_ranks(run, holder):
        numbers = " ".join(map(str, ranks))
        raise EnvironmentProblem(
            f"run {run.run_id} has ranks whose launcher is gone (processes {numbers}{since}); "
            f"end them: kill -9 {numbers}"
        )
    if holder.is_here or not holder.host:
        return
    shown = [0.0]  # when the launcher and the ranks last wrote
    for path in (run.pid, *run.log.glob(f"{RunFolder.HEARTBEAT}*.json")):
        with suppress(FileNotFoundError):  # the job has just ended
            shown.append(path.stat().st_mtime)
    with tempfile.TemporaryFile(dir=run.path) as made_now:  # by the file server's clock, too
        age_s = os.fstat(made_now.fileno()).st_mtime - max(shown)
    if age_s < LEASE_S:
        raise EnvironmentProblem(
            f"run {run.run_id} is already running (process {holder.processes[-1][0]}{since}); wait for it, "
            f"or start another: --fresh; if that machine is gone, try again in {LEASE_S - age_s:.0f} s"
        )


class Launch:
    """The launch that this rank belongs to."""

    def __init__(self, run: RunFolder):
        self.run = run
        self._has_token = LAUNCH in os.environ  # not if the script was started by hand
        self.token = os.environ[LAUNCH] if self._has_token else token_of(run)

    def check(self) -> None:
        """Raises Taken if another launch has taken the run over."""
        if token_of(self.run) != self.token:
            raise Taken(_taken(self.run))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A short block that makes a save count, which no other launch can begin within. Raises Taken."""
        with _guarded(self.run):
            self.check()
            yield

    @contextmanager
    def beating(self, rank: int) -> Iterator[None]:
        """Keep a rank's heartbeat for the length of a block, and end this process if the run is taken over.

        Raises Taken if it has been before: this rank's launcher was killed while the rank was importing.
        """
        with ExitStack() as stack:
            with _guarded(self.run):
                self.check()
                holder = Holder.read(self.run.pid)
                groups = [pid for pid, _ in holder.processes]
                if not self._has_token and holder.live_launchers() and os.getpgrp() not in groups:
                    raise Taken(_taken(self.run))
                stack.enter_context(heartbeat.beating(self.run, rank))
            stack.enter_context(repeating(self._leave_if_taken, LOOK_S, "launch"))
            yield

    def _leave_if_taken(self) -> None:
        with suppress(OSError):  # a network's file system may be away for a while
            if token_of(self.run) not in (self.token, ""):
                log.error("%s", _taken(self.run))
                os._exit(TAKEN_CODE)


def token_of(run: RunFolder) -> str:
    """The token of a run's newest launch; "" if all were by hand."""
    try:
        return run.launch.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _taken(run: RunFolder) -> str:
    holder = Holder.read(run.pid)
    by = ""
    if holder.processes:
        launcher = [*holder.live_launchers(), *(pid for pid, _ in reversed(holder.processes))][0]
        by = f" (process {launcher} on {holder.host} since {holder.since})"
    return f"run {run.run_id} is another job's{by}; this rank, whose launcher is gone, leaves it alone"


def was_interrupted(run: RunFolder) -> bool:
    """Whether the command that held the run last never returned; one on another machine counts as such."""
    holder = Holder.read(run.pid)
    commands = holder.processes[:1] if holder.is_here else []  # the first process is r1pipe itself
    return bool(holder.host) and not any(processes.is_alive(pid, began) for pid, began in commands)


def live_ranks(run: RunFolder, holder: Holder) -> list[int]:
    """Pids of this machine's processes that are ranks of the run, or about to be.

    A rank has a heartbeat from `open_run` on. Before that it is found by its process group, whose id is its
    launcher's pid even after that has died; as pids are reused, its command line must name the run folder.
    """
    beats = heartbeat.read_all(run)
    pids = {beat.pid for beat in beats if beat.is_here and processes.is_alive(beat.pid, beat.began)}
    if holder.is_here:
        members = [member for pid, _ in holder.processes for member in processes.group(pid)]
        for member in members:
            with suppress(psutil.Error):  # it has just ended, or is another user's
                if any(Path(word).name == run.run_id for word in member.cmdline()):
                    pids.add(member.pid)
    return sorted(pids)


def flock(file: IO[str], wait: bool = True) -> bool:
    """Lock an open file until it is closed; False if another process holds it and `wait` is false.

    Some cluster file systems have no locks: processes that begin within milliseconds may both continue there.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
    return True


@contextmanager
def _guarded(run: RunFolder) -> Iterator[None]:
    """Let one process at a time read and write the pid file."""
    with run.guard.open("w") as file:
        flock(file)
        yield
