"""Packing: nothing lost, nothing leaked, the same rows each time, the same number on each rank."""

import json
from collections import Counter
from itertools import groupby, islice

import numpy as np
import pytest
import torch
from tiny_runs import load_stage, tiny_run

from r1pipe.chat.template import Chat
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Example
from r1pipe.data import packing
from r1pipe.data.packing import (
    Packed,
    PackedDocuments,
    chunks,
    collate,
    epoch_batches,
    pack,
    share,
    split_long,
)
from r1pipe.data.world import corpus
from r1pipe.data.world.content import content
from r1pipe.train.run import Run

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


# --- blocks of documents, made ahead of training


@pytest.fixture
def drawn(monkeypatch):
    """The number of documents drawn, counted where each is written."""
    count = Counter()
    choose = corpus.choose

    def counting(rng, weights):
        count["documents"] += weights is content("corpus")["documents"]
        return choose(rng, weights)

    monkeypatch.setattr(corpus, "choose", counting)
    monkeypatch.setattr(packing, "BLOCK", 16)
    return count


def packed_documents(skips: list | None = None) -> PackedDocuments:
    chat = Chat.load(content_dir() / "tokenizer")
    order = lambda block: np.random.default_rng([7, block])  # noqa: E731
    progress = lambda done, total: skips.append((done, total))  # noqa: E731
    return PackedDocuments(corpus.Documents(3), chat.encode, order, 96, 5, progress)


def test_resuming_late_draws_no_earlier_document_and_gives_the_same_rows(drawn, tmp_path):
    whole = list(islice(packed_documents().batches(0, None), 60))
    assert drawn["documents"] > 20 * 16  # many blocks
    for step in (1, 31, 52):
        torch.save(whole[step - 1][1], tmp_path / "position.pt")
        position = torch.load(tmp_path / "position.pt", weights_only=True)
        drawn.clear()
        stream = packed_documents().batches(step, position)
        assert next(stream) == whole[step]
        stream.close()
        assert drawn["documents"] <= 3 * 16  # the block, the next if the batch reaches into it, and one ahead
        assert list(islice(packed_documents().batches(step, position), 60 - step)) == whole[step:]


def test_a_batch_is_the_same_as_before_there_were_positions(drawn):
    """What rows were, written down as a loop: the bundled base was trained on these."""
    packed, batches = packed_documents(), packed_documents().batches(0, None)
    texts, expected = corpus.Documents(3), []
    for block in range(4):
        pieces = [piece for text in islice(texts, 16) for piece in split_long(packed.encode(text), 96)]
        rows, _ = pack(pieces, 96)
        expected += [rows[i] for i in packed.order(block).permutation(len(rows))]
    assert [row for batch, _ in islice(batches, len(expected) // 5) for row in batch] == expected[
        : len(expected) // 5 * 5
    ]


def test_without_a_position_earlier_rows_are_made_again_and_it_says_how_far(drawn):
    whole, skips = list(islice(packed_documents().batches(0, None), 31)), []
    assert next(packed_documents(skips).batches(30, None)) == whole[30]
    assert skips == sorted(skips) and len(skips) > 3 and all(0 < done < total == 150 for done, total in skips)
    assert not (shown := []) and next(packed_documents(shown).batches(30, whole[29][1])) and not shown


def test_what_goes_wrong_in_the_thread_is_raised(drawn, monkeypatch):
    monkeypatch.setitem(corpus.content("corpus"), "documents", {"poems": 1.0})
    with pytest.raises(KeyError, match="poems"):
        next(packed_documents().batches(0, None))


def test_pretraining_saves_its_position_and_resumes_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 8)
    made, whole_block, whole_log = [], PackedDocuments.block, Run.log

    def block(self, number, state):
        made.append(number)
        return whole_block(self, number, state)

    def log(self, step, metrics):
        whole_log(self, step, metrics)
        if step == 5 and made[0] == 0:
            raise InterruptedError

    monkeypatch.setattr(PackedDocuments, "block", block)
    monkeypatch.setattr(Run, "log", log)
    settings = ("stage.max_steps=6", "stage.save_every=4", "stage.batch_size=8", "stage.sequence_length=128")
    folder = tiny_run(tmp_path / "run", "stage=pretrain", *settings)
    with pytest.raises(InterruptedError):
        load_stage("pretrain").main(str(folder))
    assert made[:3] == [0, 1, 2]
    made.clear()
    load_stage("pretrain").main(str(folder))
    assert made[0] > 2 and made == list(range(made[0], made[0] + len(made)))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
