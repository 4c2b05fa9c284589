"""Endless batches of packed documents, made in blocks by a thread one block ahead of training.

Every batch comes with the position of the row after it. A checkpoint stores it, so a resumed run
rebuilds one block only, however late it is in training.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from r1pipe.data.packing import Packed, pack, split_long
from r1pipe.data.source import Documents
from r1pipe.runs import heartbeat

BLOCK = 1024  # documents packed together: enough for rows with hardly any padding


@dataclass
class Position:
    """Where the next row is, in plain values."""

    block: int
    row: int  # of the block
    documents: Any  # `Documents.state` where the block begins


@dataclass
class PackedDocuments:
    """Batches of `batch_size` rows of at most `length` tokens; always the same for the same input."""

    documents: Documents
    encode: Callable[[str], list[int]]
    order: Callable[[int], np.random.Generator]  # block number -> the order of its rows
    length: int
    batch_size: int
    progress: Callable[[int, int], None]  # called with the rows skipped, and those to skip

    def block(self, number: int, state: Any) -> tuple[list[Packed], Any]:
        """The rows of the block whose documents begin at `state`, and the state where the next one begins."""
        self.documents.state = state
        texts = islice(self.documents, BLOCK)
        pieces = (piece for text in texts for piece in split_long(self.encode(text), self.length))
        rows, _ = pack(pieces, self.length)
        return [rows[i] for i in self.order(number).permutation(len(rows))], self.documents.state

    def batches(
        self, step: int, saved: dict[str, Any] | None
    ) -> Iterator[tuple[list[Packed], dict[str, Any]]]:
        """The batches after `step`, each with the position behind it; `saved` is the position behind `step`.

        Without it, as in checkpoints of earlier versions, all earlier rows are rebuilt and skipped.
        """
        skipped = 0 if saved else step * self.batch_size
        next_row = Position(**saved) if saved else Position(0, skipped, self.documents.state)
        batch: list[Packed] = []
        with ThreadPoolExecutor(1, "documents") as worker:
            upcoming = worker.submit(self.block, next_row.block, next_row.documents)
            while True:
                rows, state = upcoming.result()
                heartbeat.tick()
                upcoming = worker.submit(self.block, next_row.block + 1, state)
                while next_row.row < len(rows):
                    taken = rows[next_row.row :][: self.batch_size - len(batch)]
                    batch, next_row.row = batch + taken, next_row.row + len(taken)
                    if len(batch) == self.batch_size:
                        yield batch, asdict(next_row)
                        batch = []
                next_row = Position(next_row.block + 1, next_row.row - len(rows), state)
                if next_row.row:
                    self.progress(skipped - next_row.row, skipped)
