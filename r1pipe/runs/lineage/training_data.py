"""What a checkpoint was trained on, over its whole ancestry, from the records of its runs.

A run of SFT or of reward models has data/trained_on.parquet, reinforcement its rollouts, and pre-training
tokens of documents. What no record tells is unknown, and stays a value of its own (None).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1pipe.config import STAGE_TYPES, DistillConfig, EvaluateConfig, PretrainConfig, RLConfig
from r1pipe.config.groups import read as read_values
from r1pipe.config.judge import REWARDS as JUDGE_REWARDS
from r1pipe.core.paths import RunFolder
from r1pipe.runs import samples
from r1pipe.runs.lineage.ancestors import Ancestor

BY = ("source", "prompt_source", "licence", "language", "task", "teacher", "judge")  # columns counted
SHARES = (*BY, "stage", "edge")
NONE = "none"  # teacher and judge of a row that had none
JUDGED = tuple(f"score_{name}" for name in JUDGE_REWARDS)  # columns of rollouts
_PLACE = re.compile(r":\d+$")  # a row's number, after its file
_STEP = re.compile(r"step-(\d+)")
RowCounts = dict[str, dict[str | None, int]]


@dataclass
class TrainedOn:
    """What one run of the ancestry learned from."""

    run_id: str
    stage: str
    edge: str  # weights: these weights went on; data: they made data, or scored
    kind: str  # demonstrations | rollouts | documents | unknown
    rows: int | None = None  # None: not counted in rows, or unknown
    tokens: int | None = None
    counts: RowCounts = field(default_factory=dict)  # column -> value -> rows; a value None: unknown
    note: str = ""  # why it is unknown


def of_ancestors(found: Sequence[Ancestor]) -> list[TrainedOn]:
    """What each run in a lineage was trained on, once, the checkpoint's own run first; stages that only
    measure are left out. Raises CheckpointError where a file of samples cannot be read."""
    listed: dict[str, TrainedOn] = {}
    edges: list[str] = []
    for ancestor in found:
        del edges[ancestor.depth :]
        edges.append(ancestor.edge)
        by_data = "data" in edges
        known = listed.get(ancestor.parent.checkpoint)
        if known is not None:
            known.edge = known.edge if by_data else "weights"
        elif STAGE_TYPES.get(ancestor.parent.stage) is not EvaluateConfig:
            edge = "data" if by_data else "weights"
            listed[ancestor.parent.checkpoint] = of_run(ancestor, edge)
    return list(listed.values())


def of_run(ancestor: Ancestor, edge: str) -> TrainedOn:
    """What one run was trained on. Raises CheckpointError."""
    parent, record = ancestor.parent, ancestor.record
    result = TrainedOn(parent.run_id, parent.stage, edge, "unknown")
    if record is None:
        result.note = "it has no record: imported, or not finished"
        return result
    run, kind = RunFolder(Path(parent.checkpoint).parent.parent), STAGE_TYPES.get(parent.stage)
    if kind is PretrainConfig:
        return _documents(result, record)
    if draws(parent.stage, record):
        files = rollout_files(run, record.get("steps", 0))
        if files:
            return _rollouts(result, files, record)
    elif path := dataset_of(run):
        return _rows(result, path)
    result.note = "it keeps no list of its samples"
    return result


def draws(stage: str, record: Mapping[str, Any] | None) -> bool:
    """Whether a run learned from what it drew itself: reinforcement, that of a student included."""
    kind, settings = STAGE_TYPES.get(stage), ((record or {}).get("config") or {}).get("stage") or {}
    return kind is RLConfig or (kind is DistillConfig and settings.get("transfer") == "rl")


def dataset_of(run: RunFolder) -> Path | None:
    """The file that lists what a run of SFT or of reward models was trained on."""
    return next((path for path in (run.trained_on, run.dataset) if path.exists()), None)


def rollout_files(run: RunFolder, steps: int) -> dict[int, Path]:
    """The rollouts of a run up to a step, by step."""
    matches = ((_STEP.fullmatch(path.stem), path) for path in run.rollouts.glob("step-*.parquet"))
    found = {int(match[1]): path for match, path in matches if match}
    return {step: found[step] for step in sorted(found) if step <= steps}


def _documents(result: TrainedOn, record: Mapping[str, Any]) -> TrainedOn:
    """Only the bundled world has documents to pre-train on."""
    config = record.get("config") or {}
    stage = config.get("stage") or {}
    data = read_values("data/world") | (config.get("data") or {})  # early records name no licence
    result.kind = "documents"
    if stage:
        result.tokens = record.get("steps", 0) * stage["batch_size"] * stage["sequence_length"]
    result.counts = {"source": {data["name"]: 0}, "licence": {data.get("licence"): 0}}
    return result


def _rollouts(result: TrainedOn, files: Mapping[int, Path], record: Mapping[str, Any]) -> TrainedOn:
    """The completions that reinforcement trained on: its own, to prompts of its data."""
    names = ("task", "language", "source", "licence", "length", "trained", *JUDGED)
    table = pa.concat_tables([_columns(path, names) for path in files.values()], promote_options="default")
    table = table.filter(pc.fill_null(table["trained"], True))
    data = record.get("data") or {}
    world = data.get("name") if data.get("kind") == "world" else None  # older rollouts name no source
    result.kind, result.rows = "rollouts", table.num_rows
    result.tokens = pc.sum(table["length"]).as_py()
    prompts = {value or world: rows for value, rows in _grouped(table["source"]).items()}
    result.counts = {
        "source": {f"{samples.SAMPLED}{result.run_id}": result.rows},
        "prompt_source": prompts,
        **{name: _counted(table[name]) for name in ("licence", "language", "task")},
        "teacher": {(record.get("teacher") or {}).get("name", NONE): result.rows},
        "judge": _judges(table, record),
    }
    return result


def _judges(table: pa.Table, record: Mapping[str, Any]) -> dict[str | None, int]:
    """Completions by the judge that scored them: of general prompts alone, and there may be none."""
    judged = pc.sum(pc.or_(*(table[name].is_valid() for name in JUDGED))).as_py() or 0
    who = (record.get("metrics") or {}).get("judge") or {}
    named = {f"{who['name']} {who['version']}" if who else None: judged, NONE: table.num_rows - judged}
    return {judge: rows for judge, rows in named.items() if rows}


def _rows(result: TrainedOn, path: Path) -> TrainedOn:
    table = _columns(path, (*BY, "tokens"))
    result.kind, result.rows = "demonstrations", table.num_rows
    result.tokens = pc.sum(table["tokens"]).as_py()
    places = {name: _grouped(table[name]) for name in ("source", "prompt_source")}
    result.counts = places | {name: _counted(table[name]) for name in BY if name not in places}
    for name in ("teacher", "judge"):
        result.counts[name] = {value or NONE: rows for value, rows in result.counts[name].items()}
    return result


def _columns(path: Path, names: Sequence[str]) -> pa.Table:
    """The named columns of a file, null where an earlier version has none. Raises CheckpointError."""
    with samples.reading(path):
        there = pq.read_schema(path)
        table = pq.read_table(path, columns=[name for name in names if name in there.names])
    kinds = {"length": pa.int64(), "tokens": pa.int64(), "trained": pa.bool_()}
    columns = {
        name: table[name].cast(kinds.get(name, pa.string()))
        if name in table.column_names
        else pa.nulls(table.num_rows, kinds.get(name, pa.string()))
        for name in names
    }
    return pa.table(columns)


def _counted(column: pa.ChunkedArray) -> dict[str | None, int]:
    return {count["values"] or None: count["counts"] for count in pc.value_counts(column).to_pylist()}


def _grouped(column: pa.ChunkedArray) -> dict[str | None, int]:
    """The same for places: rows of one file count together."""
    groups: Counter[str | None] = Counter()
    for place, rows in _counted(column).items():
        groups[_PLACE.sub("", place) if place else None] += rows
    return dict(groups)


def prompt_ids(one: Ancestor) -> set[str]:
    """The prompts that a run was trained on; of documents there are none. Raises CheckpointError."""
    run = RunFolder(Path(one.parent.checkpoint).parent.parent)
    steps = one.record.get("steps", 0) if one.record else 0
    drawn = draws(one.parent.stage, one.record)
    paths = [*rollout_files(run, steps).values()] if drawn else [dataset_of(run)]
    tables = [_columns(path, ("prompt_id",)) for path in paths if path is not None]
    return {id for table in tables for id in pc.unique(table["prompt_id"]).to_pylist() if id is not None}


# --- summed up


def shares(runs: Sequence[TrainedOn]) -> RowCounts:
    """Rows by value for each of SHARES, all runs together, the largest first. Documents are in no row."""
    totals: dict[str, Counter[str | None]] = {name: Counter() for name in SHARES}
    for run in runs:
        for name, counts in run.counts.items():
            totals[name].update({value: rows for value, rows in counts.items() if rows})
        if run.rows:
            totals["stage"][run.stage] += run.rows
            totals["edge"][run.edge] += run.rows
    return {name: dict(counts.most_common()) for name, counts in totals.items()}


def licences(runs: Sequence[TrainedOn]) -> list[str | None]:
    """Every licence that something trained on has; None where it is unknown of some."""
    found = {licence for run in runs for licence in run.counts.get("licence", {})}
    found |= {None} if any(run.kind == "unknown" for run in runs) else set()
    return sorted(found, key=lambda licence: (licence is None, licence or ""))


# --- one sample


def find(found: Sequence[Ancestor], wanted: str) -> Iterator[dict[str, Any]]:
    """Each place where the samples of a prompt (its id) were learned from in a lineage, and how they came
    there. Raises CheckpointError."""
    seen: set[str] = set()
    for ancestor in found:
        folder, record = ancestor.parent.checkpoint, ancestor.record
        if folder in seen or record is None:
            continue
        seen.add(folder)
        run, where = RunFolder(Path(folder).parent.parent), {"run_id": ancestor.parent.run_id}
        where["stage"] = ancestor.parent.stage
        for path in {run.trained_on, run.dataset} if dataset_of(run) else ():
            if path.exists():
                for row in _matching(path, wanted):
                    yield {**where, "file": f"data/{path.name}", **_told(row)}
        for step, path in rollout_files(run, record.get("steps", 0)).items():
            for row in _matching(path, wanted):
                yield {**where, "file": f"rollouts/{path.name}", "step": step, **_told(row)}


def _matching(path: Path, wanted: str) -> list[dict[str, Any]]:
    with samples.reading(path):
        return pq.read_table(path, filters=[("prompt_id", "=", wanted)]).to_pylist()


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row has, without empty columns."""
    return {name: value for name, value in row.items() if value is not None and value != ""}
