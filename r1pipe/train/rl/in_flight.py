"""Completions that wait for their step, as a table in a checkpoint's state for resume: exact to the bit.

Sample row: {"step": 7, "place": 12, "tokens": [5, 2], "logprobs": [-0.5, -1.25], "finish_reason": "stop",
"versions": [2, 6], "experts": None, "shape": None, "kind": None}
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.core.types import Completion
from r1pipe.runs.files import replacing

FILE = "in-flight.parquet"
Row = dict[str, Any]
COLUMNS = pa.schema(
    [
        *(("step", pa.int64()), ("place", pa.int64())),  # place: number among the batch's completions
        *(("tokens", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float64()))),
        *(("finish_reason", pa.string()), ("versions", pa.list_(pa.int64()))),  # tokens, version, tokens ...
        *(("experts", pa.binary()), ("shape", pa.list_(pa.int32())), ("kind", pa.string())),
    ]
)


def row_of(step: int, place: int, completion: Completion) -> Row:
    row: Row = {"step": step, "place": place}
    row |= {name: getattr(completion, name) for name in ("tokens", "logprobs", "finish_reason")}
    row["versions"] = [*chain.from_iterable(completion.versions)]
    if (experts := completion.experts) is not None:
        row |= {"experts": experts.tobytes(), "shape": [*experts.shape], "kind": experts.dtype.str}
    return row


def table_of(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist([*rows], COLUMNS)


def write(table: pa.Table, folder: Path) -> None:
    """Write a table into a folder, in order; nothing where it has no rows."""
    if len(table):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE) as temporary:
            pq.write_table(table.sort_by([("step", "ascending"), ("place", "ascending")]), temporary)


def read(folder: Path) -> dict[tuple[int, int], Completion]:
    """The completions by step and place; their text is still to be decoded."""
    if not (folder / FILE).exists():
        return {}
    found = {}
    for row in pq.read_table(folder / FILE, schema=COLUMNS).to_pylist():
        completion = Completion(row["tokens"], row["logprobs"], row["finish_reason"])
        numbers = row["versions"]
        completion.versions = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        if row["experts"] is not None:
            completion.experts = np.frombuffer(row["experts"], row["kind"]).reshape(row["shape"]).copy()
        found[row["step"], row["place"]] = completion
    return found
