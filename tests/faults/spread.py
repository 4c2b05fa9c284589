"""A run that goes on with another number of ranks or at another ZeRO level, through DeepSpeed's universal
checkpoint: the same prompts and completions, and every metric as without the change but for rounding."""

import json
import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from faults.attempts import interrupted
from faults.forks import run_job
from faults.lab import POINTS, Lab, Shape
from faults.outcome import Outcome
from faults.same import timed
from r1pipe.paths import RunFolder

STEP = 2  # the checkpoint that is gone on from
MOVES = [  # (ranks, ZeRO level), before and after
    ((1, 1), (2, 2)),
    ((2, 2), (1, 0)),
    ((2, 3), (1, 1)),
    ((1, 0), (2, 3)),
    ((2, 1), (2, 3)),
]
RELATIVE, ABSOLUTE = 1e-4, 1e-6  # what sums in another order, and AdamW after them, may make of it


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    """A row for each stage. The short form is one move."""
    lab = Lab(folder)
    for stage in ("grpo",) if short else POINTS:
        lost = []
        for before, after in MOVES[:1] if short else MOVES:
            lost += moved(lab, Shape(stage, *before), Shape(stage, *after))
        tried = 1 if short else len(MOVES)
        held = tried - len({line.partition(":")[0] for line in lost})
        told = lost[0] if lost else "the same numbers but for rounding"
        yield Outcome(f"{stage} goes on with other ranks or ZeRO", tried, held, told)


def moved(lab: Lab, before: Shape, after: Shape) -> list[str]:
    """What differs, beyond rounding, from the run that was not moved."""
    whole = lab.reference(before).folder
    name = f"{before.stage}-{before.ranks}-{before.zero_level}-then-{after.ranks}-{after.zero_level}"
    run = interrupted(lab.folder / name, whole, STEP)
    config = json.loads(run.config.read_text())
    config["engine"] |= {"ranks": after.ranks, "zero_level": after.zero_level}
    run.config.write_text(json.dumps(config))
    run_job(after.stage, run.path, after.ranks)
    return [f"{name}: {line}" for line in differences(run, RunFolder(whole))]


def differences(run: RunFolder, whole: RunFolder) -> Iterator[str]:
    for one, other in zip_longest(rows_of(run), rows_of(whole), fillvalue={}):
        for key in {**one, **other}:
            if not (timed(key) or near(one.get(key), other.get(key))):
                yield f"step {other.get('step')}, {key}: {one.get(key)} and {other.get(key)}"
    for table in sorted(whole.rollouts.glob("*.parquet")):
        if drawn(run.rollouts / table.name) != drawn(table):
            yield f"{table.name}: other completions"
    if json.loads(run.samples.read_text()) != json.loads(whole.samples.read_text()):
        yield "samples.json: other completions"


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def near(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def drawn(table: Path) -> list[dict[str, Any]]:
    """Prompts and completions in their order, as the loop writes them whatever the ranks."""
    return pq.read_table(table, columns=["prompt_id", "completion"]).to_pylist()
