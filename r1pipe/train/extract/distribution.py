"""Distributions: what the teacher thinks of each token of a response, its likeliest tokens and the rest.

They are stored as probabilities of the student's tokens, in half precision (extract/stored.py). A local
teacher reads the responses, a server tells the likeliest tokens of its own answers (`top_logprobs`). With
stage.distribution.live nothing is stored: the teacher is read while the student trains.

Axes: B rows, T tokens of one response with its end, N tokens of a micro-batch, V vocabulary, K top tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from r1pipe.core.types import Completion
from r1pipe.runs import samples
from r1pipe.train.extract.alignment import TopK, aligned, pieces_of, unknown
from r1pipe.train.extract.dataset import Kept, Steps
from r1pipe.train.extract.feedback import without_evaluation
from r1pipe.train.extract.reading import read_examples, top_k
from r1pipe.train.extract.stored import table_of, tops_of, write_stored
from r1pipe.train.extract.work import ANSWERS, Found, Work
from r1pipe.train.rollout.sampler import Progress
from r1pipe.train.sft.filters import EXAMPLES
from r1pipe.train.sft.rejection import dataset_of, read_dataset
from r1pipe.train.shards import in_shards

PER_SHARD = 256  # responses, or fewer where they are long:
VALUES_PER_SHARD = 2**25  # probabilities that a rank holds until they are written, 8 bytes each


def distribution(work: Work) -> Found:
    """The teacher's answers, or the samples of the run in `stage.reads`, with its probabilities; for
    stage.transfer=rl, which draws from the student, the prompts alone."""
    run, stage = work.run, work.stage
    if stage.transfer == "rl":
        prompts, _ = without_evaluation(work, work.data_prompts())
        return Found([Kept(prompt, "", {"licence": prompt.licence}) for prompt in prompts], [])
    completions: list[Completion] = []
    answers: list[list[Completion]] = []
    if run.config.reads_from:
        rows, funnel = given(work)
    else:
        prompts = work.data_prompts()
        asks = 0 if work.teacher.is_local else stage.distribution.top_k
        answers = work.teacher.generate(ANSWERS, prompts, work.answers(top_logprobs=asks))
        rows, funnel, completions = work.kept(prompts, answers)
    if stage.distribution.live:
        return Found(rows, funnel)
    if work.teacher.is_local:
        rows = work.ranks.all_gather_objects(rows)[0]
        tops = in_turn(read_by_teacher(work, rows))
    else:
        tops = from_server(work, rows, completions, [*chain.from_iterable(answers)])
    if work.ranks.rank != 0:
        return Found([], [])
    return Found(*with_known(rows, write_stored(run.folder.distributions, tops), funnel))


def given(work: Work) -> tuple[list[Kept], Steps]:
    """The responses that another run has made."""
    rows = []
    for parent in work.run.config.reads_from.values():
        for one in read_dataset(dataset_of(parent)[0])[0]:
            origin = {name: getattr(one, name) for name in samples.ORIGIN}
            rows.append(Kept(one.prompt, one.response, origin, one.filters))
    return rows, [{"name": "responses given", "kept": len(rows), "dropped": 0, "examples": []}]


def with_known(rows: Sequence[Kept], stored: Mapping[int, int], funnel: Steps) -> tuple[list[Kept], Steps]:
    """The rows whose distribution is known somewhere: `stored` has its row for the number of each."""
    kept = [replace(row, distribution=stored[i]) for i, row in enumerate(rows) if i in stored]
    dropped = [row.response for i, row in enumerate(rows) if i not in stored]
    name = "probabilities of the student's tokens"
    return kept, [
        *funnel,
        {"name": name, "kept": len(kept), "dropped": len(dropped), "examples": dropped[:EXAMPLES]},
    ]


def read_by_teacher(work: Work, rows: Sequence[Kept]) -> list[Path]:
    """Shards of what a local teacher thinks of each response, in the student's tokens; null where that is too
    long.

    With the student's tokenizer its probabilities are stored as they are, else where both have one token.
    """
    teacher, ours, stage = work.teacher.local, work.run.chat, work.stage
    measure = top_k(stage.distribution.top_k)
    translate = None if teacher.chat.tokenizer_hash == ours.tokenizer_hash else Translation(work)

    def draw(part: Sequence[Kept], number: int, of: int, progress: Progress) -> pa.Table:
        examples = [teacher.chat.example(row.prompt, row.response) for row in part]
        found = []
        for row, example, read in zip(part, examples, read_examples(teacher, examples, measure), strict=True):
            top = None if read is None else TopK(*read)
            if translate and top is not None:
                top = translate(row, example.targets, top)
            found.append(top)
        progress(len(part), len(part))
        return table_of(found)

    def idle() -> None:
        read_examples(teacher, [], measure)

    longest = max(stage.sequence_length, stage.sampling.max_tokens)
    per_shard = max(1, min(PER_SHARD, VALUES_PER_SHARD // (stage.distribution.top_k * longest)))
    return in_shards(work.run, work.ranks, "distribution", rows, per_shard, draw, idle, "responses")


def in_turn(shards: Sequence[Path]) -> Iterator[tuple[int, TopK | None]]:
    """(response's number, its probabilities), shard by shard: NUMBER of COUNT has every COUNT-th."""
    for number, shard in enumerate(shards):
        for place, top in enumerate(tops_of(shard)):
            yield number + place * len(shards), top


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
        tokens = self.chat.example(row.prompt, row.response).targets
        found = aligned([self.pieces[token] for token in tokens[:-1]], theirs, likely, self.ids, self.k)
        if found is None:
            return None
        last = aligned([self._eos_piece], [self._eos_piece], [end], self.ids, self.k) if end else None
        return TopK(*(np.concatenate(pair) for pair in zip(found, last or unknown(1, self.k), strict=True)))


def from_server(
    work: Work, rows: Sequence[Kept], completions: Sequence[Completion], drawn: Sequence[Completion]
) -> Iterator[tuple[int, TopK | None]]:
    """(row's number, what a server returned for its answer), where it is known; `completions`: of the rows,
    which are among all that were `drawn`."""
    translate, kept = Translation(work), {id(one): number for number, one in enumerate(completions)}
    for place, likely in work.teacher.likely(ANSWERS, work.stage.samples_per_prompt):
        number = kept.get(id(drawn[place]))
        if likely and number is not None:
            pieces, top = [piece for piece, _ in likely], [top for _, top in likely]
            yield number, translate.along(rows[number], pieces, top)
