"""Packing: nothing lost, nothing leaked, the same rows each time, the same number on each rank."""

from itertools import groupby

import numpy as np
import pytest

from r1pipe.core.types import Example
from r1pipe.data.packing import Packed, chunks, collate, epoch_batches, pack, share, split_long

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(2, 40, 300).tolist()


def example(length: int, mark: int = 7) -> Example:
    """Tokens that tell which example they are of; all but the first third is learned."""
    return Example([mark] * length, [i >= length // 3 for i in range(length)])


@pytest.fixture(scope="module")
def rows() -> list[Packed]:
    packed, dropped = pack([example(length, mark) for mark, length in enumerate(LENGTHS)], 64)
    assert dropped == 0
    return packed


def test_every_token_is_in_exactly_one_row_and_rows_are_full(rows):
    found = [(mark, len(list(run))) for row in rows for mark, run in groupby(row.tokens)]
    assert sorted(found) == list(enumerate(LENGTHS))
    assert max(len(row.tokens) for row in rows) <= 64
    assert sum(LENGTHS) / (64 * len(rows)) > 0.97


def test_documents_of_a_row_are_numbered_from_one(rows):
    for row in rows:
        assert [number for number, _ in groupby(row.segments)] == list(range(1, row.segments[-1] + 1))
        assert len({*zip(row.tokens, row.segments, strict=True)}) == row.segments[-1]


def test_the_first_token_of_a_document_is_never_learned():
    (row,), _ = pack([Example([1, 2, 3], [True] * 3), Example([4, 5], [True] * 2)], 8)
    assert row.tokens == [1, 2, 3, 4, 5]
    assert row.loss == [False, True, True, False, True]
    assert row.learned == 3


def test_what_is_longer_than_a_row_is_dropped_and_counted():
    packed, dropped = pack([example(9), example(8), example(10)], 8)
    assert (len(packed), dropped) == (1, 2)
    assert [len(piece.tokens) for piece in split_long(list(range(20)), 8)] == [8, 8, 4]


def test_batches_depend_on_the_stream_alone_and_hold_every_row_once(rows):
    first, again, other = (list(epoch_batches(rows, 4, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(id(row) for batch in first for row in batch) == sorted(id(row) for row in rows)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_ranks_get_the_same_number_of_rows(rows, size):
    shares = [share(rows[:size], rank, 2) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    assert sum(row.learned for rank in shares for row in rank) == sum(row.learned for row in rows[:size])
    assert [len(list(chunks(rank, 2))) for rank in shares] == [min(2, len(shares[0]))] * 2


def test_collate_pads_with_segment_zero_and_nothing_to_learn(rows):
    batch = collate([rows[0], Packed(), rows[1]], pad_id=99)
    padding = batch.segments_BT == 0
    assert (batch.tokens_BT[padding] == 99).all() and not batch.loss_BT[padding].any()
    assert batch.loss_BT.sum() == rows[0].learned + rows[1].learned
    assert padding[1].all()
