"""A stage's job without a launcher: every rank is forked from a warm process, so that a real job that is
really killed costs a second and not ten.

The warm process is a fork server of multiprocessing: it has imported torch and DeepSpeed, has started no
thread, and has trained nothing.
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from faults.points import JOB, at, noted, nth_call

HERE = Path(__file__).parents[1]
LIMIT_S = 3600  # for one job
CALLS = "calls-{}.txt"  # beside a run folder's files: the points that a rank came by, over all its sessions


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the nth call of a point; nth is counted from 1 in the process that is killed."""

    point: str
    nth: int


def run_job(script: str, folder: Path, ranks: int, kill: Kill | None = None) -> bool:
    """Run stages/SCRIPT.py on a run folder; whether `kill` landed. Raises AssertionError if the job failed.

    When one rank is dead the others are killed, too, as with the node they run on.
    """
    context, port = warm(), free_port()
    jobs = [
        context.Process(target=rank_main, args=(script, str(folder), rank, ranks, port, kill))
        for rank in range(ranks)
    ]
    for job in jobs:
        job.start()
    waiting = list(jobs)
    while waiting:
        ended = wait([job.sentinel for job in waiting], timeout=LIMIT_S)
        waiting = [job for job in waiting if job.sentinel not in ended]
        if not ended or any(job.exitcode for job in jobs if job not in waiting):
            kill_all(waiting)
    codes = [job.exitcode for job in jobs]
    landed = kill is not None and -signal.SIGKILL in codes
    assert landed or codes == [0] * ranks, f"exit codes {codes}: {log_of(folder)[-3000:]}"
    return landed


def kill_all(jobs: Sequence[BaseProcess]) -> None:
    for job in jobs:
        job.kill()


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("log-*.txt")))


def calls_of(folder: Path, ranks: int) -> list[Counter[str]]:
    """By rank: point -> how often it was come by."""
    paths = [folder / CALLS.format(rank) for rank in range(ranks)]
    return [Counter(path.read_text().splitlines()) for path in paths]


def free_port() -> int:
    """Where ranks may meet: below the ports that the system hands out by itself, and nobody listens there."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@cache
def warm() -> multiprocessing.context.ForkServerContext:
    """The context of processes that start from the warm one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.warm"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def rank_main(script: str, folder: str, rank: int, ranks: int, port: int, kill: Kill | None) -> None:
    """One rank's process."""
    log = os.open(f"{folder}/log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [f"{script}.py", folder]
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, point in JOB.items():
        at(point, noted(name, Path(folder) / CALLS.format(rank)))
    if kill and rank == JOB[kill.point].rank % ranks:
        at(JOB[kill.point], nth_call(kill.nth, partial(os.kill, os.getpid(), signal.SIGKILL)))
    stage_main(script)(folder)


def stage_main(script: str) -> Callable[[str], None]:
    from tiny_runs import load_stage

    return load_stage(script).main
