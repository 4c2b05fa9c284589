"""Two jobs on one run folder, and what dead ones leave there."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from forked import wait_until

from faults.outcome import Outcome
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs import locks, processes

AT_ONCE = 3
TOLD = re.compile(r"run \S+ is already running \(process \d+ on \S+ since 20")
TAKES = """
import sys, time
from r1pipe.runs import locks
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
run = RunFolder(sys.argv[1])
print("ready", flush=True)
while not (run.path.parent / "go").exists():
    pass
try:
    with locks.held(run):
        print("has it", flush=True)
        time.sleep(3600)
except EnvironmentProblem as error:
    print(error, flush=True)
"""
# r1pipe: has the run, and starts a runner in a session of its own; that starts a rank, which imports for long
STARTS = """
import subprocess, sys, time
from r1pipe.runs import locks
from r1pipe.core.paths import RunFolder
sleeps = [sys.executable, "-c", "import time; time.sleep(3600)", sys.argv[1]]
runs = f"import subprocess, time; print(subprocess.Popen({sleeps!r}).pid, flush=True); time.sleep(3600)"
with locks.held(RunFolder(sys.argv[1])) as lock:
    runner = subprocess.Popen([sys.executable, "-c", runs], start_new_session=True)
    lock.add(runner.pid)
    runner.wait()
"""


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    rounds = 1 if short else 10
    told = [line for n in range(rounds) for line in in_the_same_moment(folder / f"round-{n}")]
    wrong = [line for line in told if line != "has it" and not TOLD.match(line)]
    held = told.count("has it") == rounds and not wrong
    yield Outcome(
        "jobs on one run in the same moment", rounds * AT_ONCE, rounds * AT_ONCE * held, (wrong or told)[-1]
    )
    left = {**stale(), "empty": "", "garbled": "{", "of a number that is another's": holder(os.getpid(), 1.0)}
    taken = {name: taken_over(folder / name.split()[0], content) for name, content in left.items()}
    problem = next((f"{name}: {line}" for name, line in taken.items() if line), "taken over")
    yield Outcome("a lock that nobody has", len(taken), sum(not line for line in taken.values()), problem)
    with launchers_killed(folder / "orphan") as (orphaned, rank):
        told = may_be_had(orphaned)
    refused = told.endswith(f"kill -9 {rank.pid}") and not may_be_had(orphaned)
    yield Outcome("a rank without launchers that has no heartbeat yet", 1, int(refused), told or "taken over")


def in_the_same_moment(folder: Path) -> list[str]:
    run = RunFolder(folder / "run")
    run.log.mkdir(parents=True)
    line = [sys.executable, "-c", TAKES, str(run.path)]
    jobs = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(AT_ONCE)]
    for job in jobs:
        assert job.stdout and job.stdout.readline() == "ready\n"
    (folder / "go").touch()
    told = [job.stdout.readline().strip() for job in jobs if job.stdout]
    for job in jobs:
        job.kill()
        job.communicate()
    return sorted(told, key=lambda line: line != "has it")


def stale() -> dict[str, str]:
    """The lock of a process that is dead, and of a machine that has shown no life."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    content = holder(gone.pid, 1.0)
    gone.wait()
    return {"dead": content, "silent machine": content.replace(socket.gethostname(), "another")}


def holder(pid: int, began: float) -> str:
    return json.dumps({"host": socket.gethostname(), "since": "long ago", "processes": [[pid, began]]})


def taken_over(folder: Path, content: str) -> str:
    """Nothing, or why the lock was not taken over."""
    run = RunFolder(folder / "run")
    run.path.mkdir(parents=True)
    run.pid.write_text(content)
    long_ago = time.time() - 2 * locks.LEASE_S
    os.utime(run.pid, (long_ago, long_ago))
    return may_be_had(run)


def may_be_had(run: RunFolder) -> str:
    """Nothing, or why not."""
    try:
        with locks.held(run):
            return ""
    except EnvironmentProblem as problem:
        return str(problem)


def processes_of(run: RunFolder) -> list[tuple[int, float]]:
    return locks.Holder.read(run.pid).processes


@contextmanager
def launchers_killed(folder: Path) -> Iterator[tuple[RunFolder, psutil.Process]]:
    """A run whose r1pipe and runner were killed while its rank was still importing; and that rank."""
    run = RunFolder(folder / "orphaned-run")
    run.log.mkdir(parents=True)
    r1pipe = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    assert r1pipe.stdout
    rank = psutil.Process(int(r1pipe.stdout.readline()))
    try:
        wait_until(lambda: len(processes_of(run)) == 2, "the lock of both")
        for pid, _ in processes_of(run):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(processes.is_alive(*one) for one in processes_of(run)), "their end")
        r1pipe.wait()
        yield run, rank
    finally:
        rank.kill()
        wait_until(lambda: not processes.is_alive(rank.pid, rank.create_time()), "the rank's end")
        r1pipe.communicate()
