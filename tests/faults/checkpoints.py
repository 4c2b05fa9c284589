"""A flipped bit, a truncated or a missing file in the newest checkpoint: the one before is used."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from unittest.mock import patch

from faults.attempts import attempt, first_lost, interrupted, same_end, uninterrupted
from faults.outcome import Outcome
from r1pipe.train.resumable import Resumable

LAST = 3  # the step after which the run is interrupted
TRIES = 12  # of each damage and stage, at files and places drawn by the seed


def flipped(path: Path, draw: Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncated(path: Path, draw: Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def missing(path: Path, draw: Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, Random], None]] = {
    "a flipped bit": flipped,
    "a truncated file": truncated,
    "a missing file": missing,
}


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    """A row for each stage and damage. The short form is one stage and one try of each."""
    for stage in ("cold_start",) if short else ("cold_start", "grpo"):
        whole = uninterrupted(folder / stage / "whole", stage)
        for number, (name, damage) in enumerate(DAMAGES.items()):
            draw = random.Random(f"{seed}/{stage}/{number}")
            lost, told = [], ""
            for n in range(1 if short else TRIES):
                copy = folder / stage / f"{number}-{n}"
                problem, told = damaged(copy, whole, damage, draw)
                lost.append(problem)
            held = lost.count("")
            yield Outcome(f"{name} in {stage}'s newest checkpoint", len(lost), held, first_lost(lost, told))
        yield every_one_damaged(folder / stage / "all", whole, stage)


def damaged(
    folder: Path, whole: Path, damage: Callable[[Path, Random], None], draw: Random
) -> tuple[str, str]:
    """What was lost by one damage (nothing: an empty line), and what the user was told."""
    run = interrupted(folder, whole, LAST)
    newest = run.checkpoint(LAST)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    file = draw.choice(files)
    damage(file, draw)
    told: list[str] = []
    with patch.object(Resumable, "warn", lambda run, text: told.append(text)):
        code, line = attempt(folder)
    where = f"{file.relative_to(newest)}: "
    if code:
        return f"{where}exit code {code}: {line}", line
    named = [text for text in told if newest.name in text and f"step {LAST - 1}" in text]
    if not named:
        return f"{where}not named", ""
    lost = same_end(folder, whole)
    return f"{where}{lost}" if lost else "", named[0]


def every_one_damaged(folder: Path, whole: Path, stage: str) -> Outcome:
    """No checkpoint is whole: refused, with the remedy, and nothing of them is touched."""
    run = interrupted(folder, whole, LAST)
    for path in run.checkpoints.glob("step-*"):
        (path / "model.safetensors").unlink()
    code, line = attempt(folder)
    held = code == 2 and "--fresh" in line and len(list(run.checkpoints.glob("step-*"))) == LAST
    return Outcome(f"all checkpoints of {stage} damaged", 1, int(held), line)
