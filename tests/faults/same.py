"""Whether two runs, or two reproductions, came out the same to the last bit, but for what is measured."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints, results

# All that may differ: what clocks and memory show, and the names of runs, which are called after the time.
MEASURED = (
    "time",  # metrics.jsonl: seconds since the run began
    "time/*",  # metrics.jsonl: seconds of a step's phases
    "*tokens_per_s",
    "tripwire/slow_step",
    *("elapsed", "seconds"),  # of the run so far, in a checkpoint's state and in record.json
    "memory_gb",  # record.json
    *("wall_s", "created", "record_hash"),  # record.json; its own hash and its parents' cover the times in it
    "run_dir",  # the final table: where a run lies
)
RUN_ID = re.compile(r"\b(\w+-s\d+)-\d{8}-\d{6}-[0-9a-f]{4}\b")  # stage, seed, time, and what makes it unique
OF_NAMES = "data_hash"  # of a file that names the run it was sampled from; the file itself is compared
NOT = "(none)"
PLACES = ("checkpoint",)  # a parent's folder; the hash beside it says whether it is the same


def pipelines(one: Path, other: Path) -> list[str]:
    """What differs between two roots that hold a finished run of each stage; empty if nothing does."""
    runs = [finished(root) for root in (one, other)]
    if runs[0].keys() != runs[1].keys():
        return [f"finished stages: {sorted(runs[0])} and {sorted(runs[1])}"]
    found = [line for stage in runs[0] for line in both(runs[0][stage], runs[1][stage])]
    return [*found, *apart(results.rows(one), results.rows(other), "final table")]


def finished(root: Path) -> dict[str, Path]:
    """Stage -> its run; raises AssertionError where a stage has two."""
    runs = results.finished_runs(root)
    stages = {run.stage: run.folder.path for run in runs}
    assert len(stages) == len(runs), f"a stage was run twice: {[run.folder.run_id for run in runs]}"
    return stages


def both(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs of a stage."""
    a, b = RunFolder(one), RunFolder(other)
    parts = {
        "checkpoints": checkpoints_apart(a.checkpoints, b.checkpoints),
        "metrics.jsonl": metrics_apart(a.metrics, b.metrics),
        "tripwires.jsonl": apart(tripped(a.tripwires), tripped(b.tripwires), "rows"),
        "dev_evaluations.jsonl": apart(*map(lines_of, (a.dev_evaluations, b.dev_evaluations)), "rows"),
        "rollouts": tables_apart(a.rollouts, b.rollouts),
        "data": tables_apart(a.data, b.data),
        "samples.json": json_apart(a.samples, b.samples),
        "evaluation.json": json_apart(a.evaluation, b.evaluation),
        "record.json": records_apart(a, b),
    }
    return [f"{other.name}: {part}: {line}" for part, lines in parts.items() for line in lines]


# --- checkpoints: what is published (weights with the experts' biases, reward models), and the rest


def checkpoints_apart(one: Path, other: Path) -> Iterator[str]:
    """Every kept checkpoint: weights, optimizer, reference model, value model, what the loop remembers."""
    yield from apart(names_in(one), names_in(other), "kept")
    for step in checkpoints.steps(one):
        a, b = one / f"step-{step}", other / f"step-{step}"
        checkpoints.verify(a, engine=True)
        checkpoints.verify(b, engine=True)
        yield from apart(files_in(a), files_in(b), f"step-{step}: files")
        for name in files_in(a) if files_in(a) == files_in(b) else []:
            yield from files_apart(a / name, b / name, f"step-{step}/{name}")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def files_in(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if Path(name).name != checkpoints.MANIFEST)


def files_apart(a: Path, b: Path, where: str) -> Iterator[str]:
    if a.read_bytes() == b.read_bytes():
        return
    if a.suffix == ".pt":
        yield from apart(*(torch.load(path, weights_only=False) for path in (a, b)), where)
    elif a.suffix == ".safetensors":
        yield from weights_apart(a, b, where)
    elif a.suffix == ".json":
        yield from apart(json.loads(a.read_text()), json.loads(b.read_text()), where)
    else:
        yield f"{where}: other bytes"


def weights_apart(a: Path, b: Path, where: str) -> Iterator[str]:
    from safetensors.torch import load_file

    found = [*apart(load_file(a), load_file(b), where)]
    yield from found or [f"{where}: other bytes"]


# --- what a run writes beside them


def metrics_apart(one: Path, other: Path) -> Iterator[str]:
    """Each step once, none missing, and every number but times the same."""
    rows = [
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in (one, other)
    ]
    steps = [row["step"] for row in rows[1]]
    if steps != [*range(1, len(steps) + 1)]:
        yield f"a gap or a repeat: {steps}"
    yield from apart(*rows, "rows")


def tripped(path: Path) -> list[dict[str, Any]]:
    """The lines of what has tripped, but for what a clock says."""
    return [row for row in lines_of(path) if row["name"] != "slow_step"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables_apart(one: Path, other: Path) -> Iterator[str]:
    """Tables row by row, and JSON beside them; a file for each step or shard, so none is there twice."""
    yield from apart(files_in(one), files_in(other), "files")
    for name in files_in(one):
        a, b = one / name, other / name
        if not b.exists():
            continue
        if a.suffix == ".parquet":
            yield from apart(pq.read_table(a).to_pylist(), pq.read_table(b).to_pylist(), name)
        else:
            yield from files_apart(a, b, name)


def records_apart(a: RunFolder, b: RunFolder) -> Iterator[str]:
    records = [json.loads(run.record.read_text()) for run in (a, b)]
    for record in records:  # what a run is called, and where it lies; files are compared one by one
        record.pop("run_id")
        record["files"] = sorted(record["files"])
        record["config"].pop("root")
    sampled = any(edge["stage"] == "rejection_sft" for edge in records[0]["parents"]["data"])
    if sampled or (a.data / "samples.parquet").exists():
        for record in records:
            record.pop(OF_NAMES)
    yield from apart(*records, "values")


def json_apart(one: Path, other: Path) -> Iterator[str]:
    if not one.exists() or not other.exists():
        yield from apart(one.exists(), other.exists(), "is there")
    else:
        yield from apart(json.loads(one.read_text()), json.loads(other.read_text()), "values")


# --- any two values


def equal(a: Any, b: Any) -> bool:
    return unnamed(a) == unnamed(b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def apart(a: Any, b: Any, where: str, same: Callable[[Any, Any], bool] = equal) -> Iterator[str]:
    """Where two values differ, by their place within them; what has no parts is asked of `same`."""
    if type(a) is not type(b):
        yield f"{where}: {short(a)} and {short(b)}"
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(bits(a), bits(b)):
            yield f"{where}: other numbers"
    elif (parts := parts_of(a, b)) is not None:
        for name, *pair in parts:
            yield from apart(*pair, f"{where}: {name}", same)
    elif not same(a, b):
        yield f"{where}: {short(a)} and {short(b)}"


def parts_of(a: Any, b: Any) -> list[tuple[Any, Any, Any]] | None:
    """What two values of one type are made of, by name or number; None where they have no parts."""
    if isinstance(a, Mapping):
        keys = [*a, *(key for key in b if key not in a)]
        return [(key, a.get(key, NOT), b.get(key, NOT)) for key in keys if not ignored(key, a, b)]
    if isinstance(a, Sequence) and not isinstance(a, str | bytes):
        return [(number, *pair) for number, pair in enumerate(zip_longest(a, b, fillvalue=NOT))]
    return parts_of(vars(a), vars(b)) if hasattr(a, "__dict__") and not isinstance(a, type) else None


def unnamed(value: Any) -> Any:
    """A text with the run ids in it cut down to stage and seed."""
    return RUN_ID.sub(r"\1", value) if isinstance(value, str) else value


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: NaN is NaN, and 0 is not -0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def ignored(key: Any, a: Mapping, b: Mapping) -> bool:
    """What a clock says, and names; a parent's folder where its hash stands beside it."""
    if key in PLACES and "hash" in a and "hash" in b:
        return True
    return isinstance(key, str) and timed(key)


def timed(key: str) -> bool:
    """Whether what stands under a name is a matter of time."""
    return any(fnmatch(key, pattern) for pattern in MEASURED)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
