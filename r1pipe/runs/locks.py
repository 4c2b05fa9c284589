"""Who has a run folder: one job at a time, on one machine or on several that share the folder.

The run's pid file names the job's processes: {"host": "node7", "since": "2026-11-25 03:56:34",
"processes": [[4711, 1795492594.1]]}, each with its number and when it began. It is written whole, under a
lock of the system that lasts no longer than the process which has it, so that of two that start in the same
moment one is refused. What dead processes leave is taken over, once no rank is left of them: a launcher that
was killed leaves ranks behind, which have a heartbeat, or are still importing. One that comes too late, when
another job has the run, refuses to begin.
"""

import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs import heartbeat, processes
from r1pipe.runs.files import write_json

LEASE_S = 60.0  # a holder on another machine that has shown no life for so long is taken for dead
RENEW_S = 10.0
# Some file systems of clusters have no locks. Then the pid file alone must do, and of two jobs that start in
# the same milliseconds both may go on.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class Taken(EnvironmentProblem):
    """Another job has the run: nothing may be written into its folder."""


@dataclass
class Holder:
    """The content of the pid file."""

    host: str
    since: str
    processes: list[tuple[int, float]] = field(default_factory=list)  # number, begin

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """None where there is none, or none that can be read."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(int(pid), float(began)) for pid, began in found["processes"]]
            return cls(str(found["host"]), str(found["since"]), pairs)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, path: Path) -> None:
        write_json(path, asdict(self), indent=None)


class Lock:
    """A run that this process has; `held` makes one."""

    def __init__(self, run: RunFolder):
        self.run = run
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self.holder = Holder(socket.gethostname(), now)
        self._renewed = time.monotonic()

    def take(self) -> None:
        """Raises EnvironmentProblem while another job has the run."""
        self.run.create()
        with _guarded(self.run):
            check_not_running(self.run)
            heartbeat.clear(self.run)  # of ranks that are dead
            self.add(os.getpid())

    def add(self, pid: int) -> None:
        """Another process of the job: the run is free once all of them are gone."""
        self.holder.processes.append((pid, processes.began(pid)))
        self.holder.write(self.run.pid)

    def renew(self) -> None:
        """Show other machines that the job lives; cheap enough to call often."""
        if time.monotonic() - self._renewed > RENEW_S:
            self._renewed = time.monotonic()
            self.holder.write(self.run.pid)

    def release(self) -> None:
        with _guarded(self.run):
            if Holder.read(self.run.pid) == self.holder:
                self.run.pid.unlink()


@contextmanager
def held(run: RunFolder) -> Iterator[Lock]:
    """Have a run for the length of a block. Raises EnvironmentProblem while another job has it."""
    lock = Lock(run)
    lock.take()
    try:
        yield lock
    finally:
        lock.release()


def job_of(run: RunFolder) -> Holder | None:
    """Who has a run whose job, launcher or ranks, is running on this machine."""
    holder = Holder.read(run.pid)
    if holder is None or holder.host != socket.gethostname() or len(holder.processes) < 2:
        return None
    return holder if processes.is_alive(*holder.processes[1]) or live_ranks(run, holder) else None


def adopt(run: RunFolder) -> Lock | None:
    """Have a run in the place of a command that died while its job runs; None where another one has it."""
    lock = Lock(run)
    with _guarded(run):
        holder = Holder.read(run.pid)
        if holder is None or holder.host != socket.gethostname() or processes.is_alive(*holder.processes[0]):
            return None
        own = (os.getpid(), processes.began(os.getpid()))
        lock.holder = replace(holder, processes=[own, *holder.processes[1:]])
        lock.holder.write(run.pid)
    return lock


def check_not_running(run: RunFolder) -> None:
    """Raises EnvironmentProblem while another job has the run, and says who."""
    holder = Holder.read(run.pid)
    elsewhere = holder is not None and holder.host != socket.gethostname()
    since = f" on {holder.host} since {holder.since}" if holder else ""
    launchers = live_launchers(holder)
    if launchers:
        raise EnvironmentProblem(
            f"run {run.run_id} is going on already (process {launchers[-1]}{since}); "
            "wait for it, or start another: --fresh"
        )
    ranks = live_ranks(run, holder)
    if ranks:
        numbers = " ".join(map(str, ranks))
        raise EnvironmentProblem(
            f"run {run.run_id} has ranks whose launcher is gone (processes {numbers}{since}); "
            f"end them: kill -9 {numbers}"
        )
    age_s = seconds_since_heartbeat(run) if elsewhere else LEASE_S
    if holder and age_s < LEASE_S:
        raise EnvironmentProblem(
            f"run {run.run_id} is going on already (process {holder.processes[-1][0]}{since}); wait for it, "
            f"or start another: --fresh; if that machine is gone, try again in {LEASE_S - age_s:.0f} s"
        )


@contextmanager
def beating(run: RunFolder, rank: int, launched_here: bool) -> Iterator[None]:
    """A rank's heartbeat for the length of a block, which begins only where no other job has the run.

    Raises Taken where one has: this rank's launcher was killed, and the run taken over since. A rank that was
    not `launched_here` (engine.hostfile) is in no process group of its launcher and cannot tell.
    """
    with ExitStack() as stack:
        with _guarded(run):
            holder = Holder.read(run.pid)
            launchers = live_launchers(holder) if launched_here else []
            if launchers and holder and os.getpgrp() not in [pid for pid, _ in holder.processes]:
                raise Taken(
                    f"run {run.run_id} is another job's (process {launchers[-1]} on {holder.host} since "
                    f"{holder.since}); this rank, whose launcher is gone, leaves it alone"
                )
            stack.enter_context(heartbeat.beating(run, rank))
        yield


def was_interrupted(run: RunFolder) -> bool:
    """Whether the command that had the run last never returned; one on another machine counts as such."""
    holder = Holder.read(run.pid)
    if holder is None or holder.host != socket.gethostname():
        return holder is not None
    return not any(processes.is_alive(pid, began) for pid, began in holder.processes[:1])  # r1pipe itself


def live_launchers(holder: Holder | None) -> list[int]:
    """Numbers of a holder's own processes, where it is on this machine: r1pipe and DeepSpeed's runner."""
    if holder is None or holder.host != socket.gethostname():
        return []
    return [pid for pid, began in holder.processes if processes.is_alive(pid, began)]


def live_ranks(run: RunFolder, holder: Holder | None) -> list[int]:
    """Numbers of this machine's processes that are ranks of the run, or about to be.

    A rank has a heartbeat from `open_run` on. Before, it is known by its launcher's process group, which
    keeps the number of the launcher after its death; as numbers come again, the run folder must be among its
    words, too.
    """
    beats = [beat for beat in heartbeat.read_all(run) if beat.host == socket.gethostname()]
    found = {beat.pid for beat in beats if processes.is_alive(beat.pid, beat.began)}
    if holder is not None and holder.host == socket.gethostname():
        members = [member for pid, _ in holder.processes for member in processes.group(pid)]
        found |= {member.pid for member in members if processes.is_called_with(member, run.run_id)}
    return sorted(found)


def seconds_since_heartbeat(run: RunFolder) -> float:
    """Since the launcher or a rank last showed life, by the clock of the machine that keeps the files."""
    shown = [0.0]
    for path in (run.pid, *run.log.glob(f"{RunFolder.HEARTBEAT}*.json")):
        with suppress(FileNotFoundError):  # it ends in this moment
            shown.append(path.stat().st_mtime)
    with tempfile.TemporaryFile(dir=run.path) as made_now:
        return os.fstat(made_now.fileno()).st_mtime - max(shown)


@contextmanager
def _guarded(run: RunFolder) -> Iterator[None]:
    """One process at a time looks and writes."""
    with run.guard.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        yield
