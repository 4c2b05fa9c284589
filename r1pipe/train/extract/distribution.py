"""Distributions: what the teacher thinks of each token of a response, its likeliest tokens and the rest.

They are stored as probabilities of the student's tokens, in half precision. A local teacher reads the
responses, a server tells the likeliest tokens of its own answers (`top_logprobs`). With
stage.distribution.live nothing is stored: the teacher is read while the student trains.

Axes: B rows, T tokens of one response with its end, N tokens of a micro-batch, V vocabulary, K top tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from r1pipe.core.types import Completion, Example
from r1pipe.runs import samples
from r1pipe.train.extract.alignment import TopK, aligned, pieces_of, unknown
from r1pipe.train.extract.dataset import COLUMNS, Kept, Steps
from r1pipe.train.extract.feedback import without_evaluation
from r1pipe.train.extract.reading import read_examples, top_k
from r1pipe.train.extract.work import ANSWERS, Found, Work
from r1pipe.train.rollout.sampler import Progress
from r1pipe.train.sft.filters import EXAMPLES
from r1pipe.train.sft.rejection import dataset_of, read_dataset
from r1pipe.train.shards import in_order, in_shards

PER_SHARD = 256  # responses
NAMES = ("top_ids", "top_logprobs", "rest_logprobs")
SCHEMA = pa.schema([(name, COLUMNS[name]) for name in NAMES])


def distribution(work: Work) -> Found:
    """The teacher's answers, or the samples of the run in `stage.reads`, with its probabilities; for
    stage.transfer=rl, which draws from the student, the prompts alone."""
    run, stage = work.run, work.stage
    if stage.transfer == "rl":
        prompts, _ = without_evaluation(work, work.data_prompts())
        return Found([Kept(prompt, "", {"licence": prompt.licence}) for prompt in prompts], [])
    completions: list[Completion] = []
    if run.config.reads_from:
        rows, funnel = given(work)
    else:
        prompts = work.data_prompts()
        asks = 0 if work.teacher.is_local else stage.distribution.top_k
        answers = work.teacher.ask(ANSWERS, prompts, work.answers(top_logprobs=asks))
        rows, funnel, completions = work.kept(prompts, answers)
    if stage.distribution.live:
        return Found(rows, funnel)
    if work.teacher.is_local:
        rows = work.ranks.all_gather_objects(rows)[0]
        found = read_by_teacher(work, rows)
    else:
        found = told_by_server(work, rows, completions)
    return Found(*with_known(rows, found, funnel))


def given(work: Work) -> tuple[list[Kept], Steps]:
    """The responses that another run has made."""
    rows = []
    for parent in work.run.config.reads_from.values():
        for one in read_dataset(dataset_of(parent)[0])[0]:
            origin = {name: getattr(one, name) for name in samples.ORIGIN}
            rows.append(Kept(one.prompt, one.response, origin, one.filters))
    return rows, [{"name": "responses given", "kept": len(rows), "dropped": 0, "examples": []}]


def with_known(rows: Sequence[Kept], found: Sequence[TopK | None], funnel: Steps) -> tuple[list[Kept], Steps]:
    """The rows whose distribution is known somewhere."""
    kept, dropped = [], []
    for row, top in zip(rows, found, strict=True):
        if top is None or (top.ids_TK < 0).all():
            dropped.append(row.response)
            continue
        values = [top.ids_TK.ravel(), top.logprobs_TK.ravel(), top.rest_T]
        kept.append(replace(row, distribution=dict(zip(NAMES, values, strict=True))))
    name = "probabilities of the student's tokens"
    return kept, [
        *funnel,
        {"name": name, "kept": len(kept), "dropped": len(dropped), "examples": dropped[:EXAMPLES]},
    ]


def read_by_teacher(work: Work, rows: Sequence[Kept]) -> list[TopK | None]:
    """What a local teacher thinks of each response, in the student's tokens; None where that is too long.

    With the student's tokenizer its probabilities are stored as they are, else where both have one token.
    """
    teacher, ours, k = work.teacher.local, work.run.chat, work.stage.distribution.top_k
    translate = None if teacher.chat.tokenizer_hash == ours.tokenizer_hash else Translation(work)

    def draw(part: Sequence[Kept], number: int, of: int, progress: Progress) -> pa.Table:
        examples = [teacher.chat.example(row.prompt, row.response) for row in part]
        found = []
        for row, example, read in zip(
            part, examples, read_examples(teacher, examples, top_k(k)), strict=True
        ):
            top = None if read is None else TopK(*read)
            if translate and top is not None:
                top = translate(row, learned(example), top)
            found.append(top)
        progress(len(part), len(part))
        return pa.Table.from_pylist([_stored(top) for top in found], SCHEMA)

    def idle() -> None:
        read_examples(teacher, [], top_k(k))

    shards = in_shards(work.run, work.ranks, "distribution", rows, PER_SHARD, draw, idle, "responses")
    return [stored_top(row) for [row] in in_order(shards)]


def learned(example: Example) -> list[int]:
    """The tokens of the response, with the one that ends it."""
    return [token for token, is_learned in zip(example.tokens, example.loss, strict=True) if is_learned]


class Translation:
    """From a teacher's tokens to the student's, by their bytes."""

    def __init__(self, work: Work):
        self.chat, self.k = work.run.chat, work.stage.distribution.top_k
        self.pieces = pieces_of(self.chat.tokenizer)
        self.ids = {piece: number for number, piece in reversed([*enumerate(self.pieces)]) if piece}
        self.teacher = work.teacher.local.chat if work.teacher.is_local else None
        self.their_pieces = pieces_of(self.teacher.tokenizer) if self.teacher else []

    def __call__(self, row: Kept, tokens: Sequence[int], top: TopK) -> TopK | None:
        """`top`: of a local teacher along its own tokens, the last of which ends the answer."""
        assert self.teacher is not None
        theirs = [self.their_pieces[token] for token in tokens[:-1]]
        likely = [
            [(self._piece(i), float(p)) for i, p in zip(*pair, strict=True)]
            for pair in zip(top.ids_TK, top.logprobs_TK, strict=True)
        ]
        return self.along(row, theirs, likely[:-1], likely[-1])

    def _piece(self, theirs: int) -> bytes:
        """Of one of their tokens; what ends an answer is what ends ours."""
        assert self.teacher is not None
        if theirs in self.teacher.eos_ids:
            return self._eos_piece
        return self.their_pieces[theirs] if theirs < len(self.their_pieces) else b""

    @property
    def _eos_piece(self) -> bytes:
        return self.pieces[self.chat.eos_id]

    def along(
        self,
        row: Kept,
        theirs: Sequence[bytes],
        likely: Sequence[Sequence[tuple[bytes, float]]],
        end: Sequence[tuple[bytes, float]] = (),
    ) -> TopK | None:
        """In the student's tokens; `end`: what is likely after the last of theirs; unknown where empty."""
        tokens = learned(self.chat.example(row.prompt, row.response))
        found = aligned([self.pieces[token] for token in tokens[:-1]], theirs, likely, self.ids, self.k)
        if found is None:
            return None
        last = aligned([self._eos_piece], [self._eos_piece], [end], self.ids, self.k) if end else None
        return TopK(*(np.concatenate(pair) for pair in zip(found, last or unknown(1, self.k), strict=True)))


def told_by_server(work: Work, rows: Sequence[Kept], completions: Sequence[Completion]) -> list[TopK | None]:
    """What a server has told of each of its answers; None without, or of another text."""
    translate = Translation(work)
    found: list[TopK | None] = []
    for row, completion in zip(rows, completions, strict=True):
        likely = completion.likely or []
        top = translate.along(row, [piece for piece, _ in likely], [top for _, top in likely])
        found.append(top if likely else None)
    return found


def _stored(top: TopK | None) -> dict[str, np.ndarray | None]:
    if top is None:
        return dict.fromkeys(NAMES)
    halves = top.logprobs_TK.astype(np.float16).ravel(), top.rest_T.astype(np.float16)
    return dict(zip(NAMES, (top.ids_TK.ravel(), *halves), strict=True))


def stored_top(row: Mapping[str, Any]) -> TopK | None:
    """The distribution in a row of the dataset; None where it has none."""
    ids, logprobs, rest = (row[name] for name in NAMES)
    if ids is None or logprobs is None or rest is None:
        return None
    shape = (len(rest), -1)
    return TopK(
        np.array(ids, np.int32).reshape(shape),
        np.array(logprobs, np.float16).reshape(shape),
        np.array(rest, np.float16),
    )
