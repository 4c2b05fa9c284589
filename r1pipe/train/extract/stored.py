"""A teacher's probabilities on disk: data/distributions.arrow, written row by row and mapped to be read.

A row has what the teacher thinks of the T tokens of one response, with the one that ends it. The dataset's
column `distribution` has its number. A reader's memory holds no more than the rows that it looks at.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.core.errors import CheckpointError
from r1pipe.runs import samples
from r1pipe.runs.checkpoints import file_hash
from r1pipe.runs.files import replacing
from r1pipe.train.extract.alignment import NONE, TopK

ROWS = 16  # responses in memory at a time
HASH = b"distributions"  # in the dataset's metadata: SHA-256 of the file, so that the dataset's own covers it
REMEDY = "remove data/samples.parquet beside it, and repeat the command to make both again"
TOP = pa.schema(
    [
        (
            "top_ids",
            pa.list_(pa.int32()),
        ),  # [T * K] the student's tokens, the likeliest first; NONE: no token
        ("top_logprobs", pa.list_(pa.float16())),  # [T * K] the teacher's log-probabilities
        ("rest_logprobs", pa.list_(pa.float16())),  # [T] log of the probability of all others; 0: none known
    ]
)
SCHEMA = TOP.append(pa.field("known", pa.int32()))  # how many of the T have a token


def table_of(tops: Sequence[TopK | None]) -> pa.Table:
    """The rows of a shard; null where there is none."""
    columns: list[list[Any]] = [
        [None if top is None else top.ids_TK.astype(np.int32).ravel() for top in tops],
        [None if top is None else top.logprobs_TK.astype(np.float16).ravel() for top in tops],
        [None if top is None else top.rest_T.astype(np.float16) for top in tops],
    ]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, TOP.types, strict=True)]
    return pa.Table.from_arrays(arrays, schema=TOP)


def tops_of(shard: Path) -> Iterator[TopK | None]:
    """The rows of a shard, a few of them in memory. Raises CheckpointError where it is damaged."""
    with samples.reading(shard, "remove it, and repeat the command to make it again"):
        for batch in pq.ParquetFile(shard).iter_batches(ROWS, columns=TOP.names):
            yield from (_top(batch, row) for row in range(batch.num_rows))


def _top(batch: pa.RecordBatch, row: int) -> TopK | None:
    lists = [batch.column(name)[row].values for name in TOP.names]
    if any(values is None for values in lists):
        return None
    ids, logprobs, rest = (values.to_numpy() for values in lists)
    shape = (len(rest), -1)
    return TopK(ids.reshape(shape), logprobs.reshape(shape), rest)


def write_stored(path: Path, tops: Iterable[tuple[int, TopK | None]]) -> dict[int, int]:
    """Write the file, from (response's number, its probabilities); the row of each response of which
    something is known."""
    rows: dict[int, int] = {}
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        part: list[TopK] = []
        for number, top in tops:
            if top is None or (top.ids_TK == NONE).all():
                continue
            rows[number] = len(rows)
            part.append(top)
            if len(part) == ROWS:
                writer.write_table(_with_known(part))
                part = []
        if part:
            writer.write_table(_with_known(part))
    return rows


def _with_known(tops: Sequence[TopK]) -> pa.Table:
    known = [int((top.ids_TK != NONE).any(-1).sum()) for top in tops]
    return table_of(tops).append_column(SCHEMA.field("known"), pa.array(known, pa.int32()))


class Stored:
    """The file, mapped: `stored[row]` is a response's probabilities. Raises CheckpointError where it is
    damaged."""

    def __init__(self, path: Path):
        with samples.reading(path, REMEDY):
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        self._begins = [*accumulate((batch.num_rows for batch in self._batches), initial=0)]

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, row: int) -> TopK:
        top = _top(*self._place(row))
        assert top is not None, "write_stored leaves nothing out"
        return top

    def tokens(self, row: int) -> int:
        """T of a row."""
        batch, place = self._place(row)
        return len(batch.column("rest_logprobs")[place])

    def known(self, row: int) -> int:
        batch, place = self._place(row)
        return batch.column("known")[place].as_py()

    def _place(self, row: int) -> tuple[pa.RecordBatch, int]:
        batch = bisect_right(self._begins, row) - 1
        return self._batches[batch], row - self._begins[batch]


def check_stored(path: Path, dataset: Path) -> None:
    """Raises CheckpointError where the file is not the one that the dataset was made with."""
    with samples.reading(dataset):
        expected = (pq.read_schema(dataset).metadata or {}).get(HASH)
    if expected is None:
        return
    if not path.is_file() or file_hash(path).encode() != expected:
        raise CheckpointError(f"{path} is missing or has changed; {REMEDY}")
