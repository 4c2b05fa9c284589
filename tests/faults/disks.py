"""A disk that is full while a job writes: one line, the last good checkpoint stays, and it goes on later."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from faults.attempts import STEPS, attempt, begin, first_lost, same_end, uninterrupted
from faults.lab import BESIDE
from faults.outcome import Outcome
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.train.resumable import Resumable

MEBIBYTE = 2**20
SIZE = 24  # MiB of the disk
TRIES = 8


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    """A row for what the disk is full before: a checkpoint, or a line of the metrics."""
    draw = random.Random(f"{seed}/disk")
    with small_disk(folder / "disk") as disk:
        if disk is None:
            yield Outcome("a full disk", 0, 0, "left out: mounting a small file system takes root")
            return
        whole = uninterrupted(folder / "whole", "cold_start")
        size = sum(path.stat().st_size for path in RunFolder(whole).checkpoint(1).rglob("*"))
        tries = 1 if short else TRIES
        room = [draw.randrange(4096, size * 9 // 10) for _ in range(tries)]  # of what a checkpoint takes
        steps = [draw.randrange(2, STEPS + 1) for _ in range(tries)]
        for what, method, leave, words in (
            ("while saving", "save_checkpoint", room, ()),
            ("while a copy is saved", "save_checkpoint", room, BESIDE),
            ("before a step is logged", "log", [0] * tries, ()),
        ):
            each = zip(leave, steps, strict=True)
            found = [filled(disk, whole, method, one, step, words) for one, step in each]
            lost = [problem for problem, _ in found]
            yield Outcome(f"disk full {what}", tries, lost.count(""), first_lost(lost, found[-1][1]))


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A file system of its own; None where none can be mounted."""
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def filled(
    disk: Path, whole: Path, method: str, leave: int, step: int, words: tuple[str, ...]
) -> tuple[str, str]:
    """What was lost where the disk has `leave` bytes when a method of the run is called for a step."""
    folder = begin(disk / "run", "cold_start", *words)
    real, ballast = getattr(Resumable, method), disk / "ballast"

    def full(run: Resumable, *arguments: object, **named: object) -> object:
        if step in arguments and not ballast.exists():
            run.saved()  # what is on its way is not what the fault is about
            ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - leave)))
        return real(run, *arguments, **named)

    with patch.object(Resumable, method, full):
        code, line = attempt(folder)
    run = RunFolder(folder)
    there = sorted(path.name for path in run.checkpoints.iterdir())
    problem = ""
    if code != 2 or "is full" not in line:
        problem = f"step {step}, {leave} bytes left: exit code {code}, {line or 'no line'}"
    elif any(name.startswith(".") for name in there) or f"step-{step - 1}" not in there:
        problem = f"step {step}, {leave} bytes left: there is {', '.join(there)}"
    ballast.unlink(missing_ok=True)
    checkpoints.verify(run.checkpoint(step - 1), engine=True)
    code, later = attempt(folder)
    problem = problem or (f"did not go on: {later}" if code else same_end(folder, whole))
    shutil.rmtree(folder)
    return problem, line
