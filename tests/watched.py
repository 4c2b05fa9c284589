"""Jobs that a test follows to their end: of real ranks, or of fake ones (fake_ranks.py)."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import psutil
from forked import wait_until
from tiny_runs import tiny_config

from r1pipe.core.paths import RunFolder
from r1pipe.launch.job import Job, failure
from r1pipe.runs import heartbeat, machine, processes

STUCK_AFTER_S = 4.0
HANG = {
    "hangs",
    "stopped",
    "two_collectives",
    "hangs_in_a_compiler",
    "hangs_while_saving",
    "saves_slowly",
    "starved",
}


class Ended(NamedTuple):
    """How a job ended."""

    code: int
    line: str  # for the user
    seconds: float  # from the fault on
    run: RunFolder


@contextmanager
def fake_launcher(folder: Path, how: str) -> Iterator[None]:
    """Jobs are fake ranks, of which the last does `how`."""
    script = folder / "deepspeed"
    launcher = shlex.join([sys.executable, str(Path(__file__).with_name("fake_ranks.py"))])
    script.write_text(f'#!/bin/sh\nexec {launcher} "$@"\n')
    script.chmod(0o755)
    with patch.object(machine, "find_launcher", lambda engine: str(script)), patch.dict(os.environ, FAKE=how):
        yield


def start(folder: Path, *words: str) -> Job:
    """Start a job on `folder`/run, or have it go on."""
    job = Job(tiny_config(*words, "tracking=none", f"root={folder}"), RunFolder(folder / "run"))
    job.start()
    return job


def ends(job: Job, ready: Callable[[], object], act: Callable[[], None] = lambda: None) -> Ended:
    """Follow a job to its end; once it is `ready`, `act`. No process of it may be left."""
    began: list[float] = []

    def disturb() -> None:
        wait_until(lambda: ready() or job.process.poll() is not None, "the job to be ready")
        began.append(time.monotonic())
        if job.process.poll() is None:
            act()

    thread = threading.Thread(target=disturb)
    thread.start()
    job.follow()
    ended_at = time.monotonic()
    thread.join()
    family = processes.group(job.process.pid)
    code = job.end()
    wait_until(lambda: not any(map(is_running, family)), "the end of its processes")
    line = failure(job.run, code) if code else ""
    return Ended(code, line, ended_at - began[0], job.run)


def end_of(how: str, folder: Path, ranks: int, *words: str, act: Callable[[], None] = lambda: None) -> Ended:
    """How a job of fake ranks ends of which the last does `how`.

    However slowly a busy machine starts them: engine.stuck_after_s falls to STUCK_AFTER_S once the last rank
    hangs and the others wait for it.
    """
    run = RunFolder(folder / "run")
    with fake_launcher(folder, how):
        words = ("engine.stuck_after_s=3600", "engine.grace_s=600", *words)
        job = start(folder, "stage=pretrain", f"engine.ranks={ranks}", *words)

        def ready() -> bool:
            others = [beat for beat in heartbeat.read_all(run) if beat.rank < ranks - 1]
            return (run.path / "there").exists() and all(beat.waiting for beat in others)

        def act_when_ready() -> None:
            if how in HANG:
                job.watch.stuck_after_s = STUCK_AFTER_S
            act()

        return ends(job, ready, act_when_ready)


def is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def signals_here(*numbers: signal.Signals, after_s: float = 0.3) -> Callable[[], None]:
    """Send signals to this process, which follows the job."""

    def act() -> None:
        for number in numbers:
            time.sleep(after_s)
            os.kill(os.getpid(), number)

    return act
