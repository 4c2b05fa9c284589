"""Packing: several documents in one row, separated by segment numbers so that nothing leaks between them.

The model's `segments` argument keeps attention inside a document and restarts positions in each.
`PackedDocuments` packs endless pre-training text in blocks, by a thread one block ahead of training.
Axes: B rows, T tokens of a row.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1pipe.core.types import Example
from r1pipe.data.source import Documents
from r1pipe.runs import heartbeat

BLOCK = 1024  # documents packed together: enough for rows with hardly any padding


@dataclass
class Packed:
    """One row: consecutive documents, numbered from 1. Lists of equal length, not padded."""

    tokens: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)  # whether the token is learned; never a document's first

    def add(self, example: Example) -> None:
        number = self.segments[-1] + 1 if self.segments else 1
        self.tokens += example.tokens
        self.segments += [number] * len(example.tokens)
        self.loss += [False, *example.loss[1:]]  # a first token would be predicted from another document

    @property
    def learned(self) -> int:
        return sum(self.loss)


@dataclass
class Batch:
    """Rows as tensors, padded at the end with segment 0."""

    tokens_BT: Tensor  # int64
    segments_BT: Tensor  # int64; 0 is padding
    loss_BT: Tensor  # bool

    @property
    def positions(self) -> int:
        """Tokens that go through the model, with padding."""
        return self.tokens_BT.numel()

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens_BT.to(device), self.segments_BT.to(device), self.loss_BT.to(device))


def pack(
    examples: Iterable[Example], length: int, kind: Callable[[], Packed] = Packed
) -> tuple[list[Packed], int]:
    """Rows of at most `length` tokens, and how many examples were too long for one and left out; `kind` makes
    an empty row.

    Longest first, each into the fullest row that has room for it (best fit decreasing): as tight as first
    fit, and quick for many rows. The same examples always give the same rows.
    """
    examples = list(examples)
    fitting = [example for example in examples if len(example.tokens) <= length]
    rows: list[Packed] = []
    room: dict[int, list[Packed]] = {}  # free tokens -> rows that have so many
    sizes: list[int] = []  # the keys of `room`, sorted
    for example in sorted(fitting, key=lambda example: -len(example.tokens)):
        place = bisect.bisect_left(sizes, len(example.tokens))
        if place < len(sizes):
            free = sizes[place]
            row = room[free].pop()
            if not room[free]:
                del room[free], sizes[place]
        else:
            free, row = length, kind()
            rows.append(row)
        row.add(example)
        free -= len(example.tokens)
        if free not in room:
            room[free] = []
            bisect.insort(sizes, free)
        room[free].append(row)
    return rows, len(examples) - len(fitting)


def split_long(tokens: list[int], length: int) -> Iterator[Example]:
    """A document for next-token prediction, in pieces that fit a row."""
    for start in range(0, len(tokens), length):
        piece = tokens[start : start + length]
        yield Example(piece, [True] * len(piece))


def epoch_batches(rows: list[Packed], batch_size: int, order: np.random.Generator) -> Iterator[list[Packed]]:
    """One pass over the rows in a random order; the last batch may be smaller."""
    shuffled = [rows[i] for i in order.permutation(len(rows))]
    for start in range(0, len(shuffled), batch_size):
        yield shuffled[start : start + batch_size]


def share(batch: list[Packed], rank: int, world_size: int) -> list[Packed]:
    """A rank's rows of a batch: the same number on each, with empty rows where the batch does not divide."""
    rows = batch[rank::world_size]
    return rows + [Packed() for _ in range(-(-len(batch) // world_size) - len(rows))]


def chunks(rows: list[Packed], parts: int) -> Iterator[list[Packed]]:
    """The rows in at most `parts` micro-batches of the same size but for the last."""
    size = -(-len(rows) // parts)
    remaining = iter(rows)
    while micro := list(islice(remaining, size)):
        yield micro


def collate(rows: list[Packed], pad_id: int) -> Batch:
    """Rows as tensors, padded to the longest of them."""
    width = max(1, *(len(row.tokens) for row in rows))
    tokens = np.full((len(rows), width), pad_id, dtype=np.int64)
    segments = np.zeros((len(rows), width), dtype=np.int64)
    loss = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        end = len(row.tokens)
        tokens[i, :end], segments[i, :end], loss[i, :end] = row.tokens, row.segments, row.loss
    return Batch(torch.from_numpy(tokens), torch.from_numpy(segments), torch.from_numpy(loss))


@dataclass
class PackedDocuments:
    """Endless batches of `batch_size` rows of at most `length` tokens; always the same for the same input.

    Every batch comes with the position of the row after it. A checkpoint stores it, so a resumed run
    rebuilds one block only, however late it is in training.
    """

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

        A position: the next row's block, its place in it, and `Documents.state` where the block begins.
        Without it, as in checkpoints of earlier versions, all earlier rows are rebuilt and skipped.
        """
        skipped = 0 if saved else step * self.batch_size
        saved = saved or {"block": 0, "row": skipped, "documents": self.documents.state}
        number, row, state = saved["block"], saved["row"], saved["documents"]
        batch: list[Packed] = []
        with ThreadPoolExecutor(1, "documents") as worker:
            upcoming = worker.submit(self.block, number, state)
            while True:
                rows, next_state = upcoming.result()
                heartbeat.tick()
                upcoming = worker.submit(self.block, number + 1, next_state)
                while row < len(rows):
                    taken = rows[row:][: self.batch_size - len(batch)]
                    batch, row = batch + taken, row + len(taken)
                    if len(batch) == self.batch_size:
                        yield batch, {"block": number, "row": row, "documents": state}
                        batch = []
                number, row, state = number + 1, row - len(rows), next_state
                if row:
                    self.progress(skipped - row, skipped)
