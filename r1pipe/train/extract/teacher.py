"""The teacher of a run: asked in shards, which are kept, and accounted for."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.chat.answerer import Answerer, AnswerParams, Identity, Progress, Spent
from r1pipe.chat.server import ServerAnswerer
from r1pipe.chat.template import MARK, Chat
from r1pipe.config import DistillConfig
from r1pipe.core.types import Completion, Message, Prompt
from r1pipe.runs import samples
from r1pipe.runs.record import TeacherFacts
from r1pipe.train.answering import LocalAnswerer, open_answerer
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.extract.served import Rows, asked_in_shards
from r1pipe.train.run import Run
from r1pipe.train.shards import SHARD_ROUNDS, in_order, in_shards

Likely = list[tuple[bytes, list[tuple[bytes, float]]]]  # see Completion.likely
TEXTS = ["text", "finish_reason", "tokens"]
SPENT = b"spent"  # in a shard's metadata: what it took
LIKELY = pa.list_(
    pa.struct([("piece", pa.binary()), ("top", pa.list_(pa.binary())), ("logprobs", pa.list_(pa.float32()))])
)
ANSWER = pa.schema(
    [("text", pa.string()), ("finish_reason", pa.string()), ("tokens", pa.int64()), ("likely", LIKELY)]
)


@dataclass(frozen=True)
class GenerationParams:
    """How something is drawn from the teacher."""

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    n: int = 1
    top_logprobs: int = 0
    # What is asked decides the random numbers, too: of work that comes again with other prompts, as a step's.
    by_content: bool = False


class TeacherGenerator:
    """The run's teacher. All ranks make it and call it alike; each answer is asked for once."""

    def __init__(self, run: Run[DistillConfig], ranks: Ranks):
        named = run.config.teacher_from or run.config.teacher
        assert named is not None, "the caller has one"
        self.run, self.ranks = run, ranks
        self._shards: dict[str, list[Path]] = {}  # of the newest work of each name
        self.answerer: Answerer = open_answerer(run, ranks, "teacher", named, run.stage.teacher)

    @property
    def identity(self) -> Identity:
        return self.answerer.identity

    @property
    def local(self) -> LocalAnswerer:
        """The teacher as a model of this job. The config's rules refuse a server where it is needed."""
        assert isinstance(self.answerer, LocalAnswerer)
        return self.answerer

    @property
    def is_local(self) -> bool:
        return isinstance(self.answerer, LocalAnswerer)

    def seed(self, name: str) -> int:
        """Of the draws of one piece of work."""
        return self.run.seed(f"teacher {name}")

    def generate(self, name: str, prompts: Sequence[Prompt], how: GenerationParams) -> list[list[Completion]]:
        """`how.n` answers to each prompt, the same on every rank. `name`: of this piece of work, for its
        shards. Raises EnvironmentProblem where a server is lost; what it had answered is kept."""

        def draw(part: Sequence[Prompt], params: AnswerParams, progress: Progress) -> list[list[Completion]]:
            return self.answerer.answer(part, params, progress)

        return self._drawn(name, prompts, how, draw)

    def users_words(
        self, name: str, contexts: Sequence[tuple[Message, ...]], how: GenerationParams
    ) -> list[str]:
        """What a user says after each context, drawn by the model itself: the conversation up to the user's
        words is continued (Magpie, arXiv 2406.08464). "" where it does not end."""
        chat = self.local.chat
        starts = [_before_user(chat, context) for context in contexts]
        stops = tuple({stop for _, stop in starts if stop is not None})

        def draw(
            part: Sequence[list[int]], params: AnswerParams, progress: Progress
        ) -> list[list[Completion]]:
            drawn = self.local.continued(part, params, progress, stops)
            for each in drawn:
                for completion in each:
                    completion.text = chat.decode(completion.tokens)
            return drawn

        drawn = self._drawn(name, [tokens for tokens, _ in starts], how, draw)
        return ["" if completion.truncated else completion.text for [completion] in drawn]

    def _drawn(
        self, name: str, items: Sequence[Any], how: GenerationParams, draw: Any
    ) -> list[list[Completion]]:
        stage, answerer = self.run.stage, self.answerer
        seqs = stage.sampling.max_num_seqs
        state = hashlib.sha256(repr([*items]).encode()).hexdigest()[:8]
        params = AnswerParams(
            how.max_tokens,
            how.temperature,
            how.top_p,
            how.n,
            self.seed(f"{name} {state}" if how.by_content else name),
            seqs,
            top_logprobs=how.top_logprobs,
        )
        if isinstance(answerer, ServerAnswerer):
            shards = self._shards[name] = self._of_server(answerer, name, items, params, state)
            return [[_completion(row) for row in rows] for rows in in_order(shards, how.n, TEXTS)]
        per_shard = max(1, SHARD_ROUNDS * seqs // how.n)

        def shard(part: Sequence[Any], number: int, of: int, progress: Progress) -> pa.Table:
            before = replace(answerer.spent)
            answers = draw(part, replace(params, first=number, stride=of), progress)
            rows = [_row(completion) for each in answers for completion in each]
            return _table(rows, answerer.spent - before)

        def idle() -> None:
            draw([], params, lambda done, total: None)

        shards = in_shards(self.run, self.ranks, name, items, per_shard, shard, idle, each=how.n, state=state)
        self._shards[name] = shards
        return [[_completion(row) for row in rows] for rows in in_order(shards, how.n, TEXTS)]

    def likely(self, name: str, each: int) -> Iterator[tuple[int, Likely | None]]:
        """(answer's number, what a server has told of its tokens) of the newest work `name`, `each` to a
        prompt, shard by shard: too much for the memory."""
        shards = self._shards[name]
        for number, shard in enumerate(shards):
            for place, likely in enumerate(_likely_of(shard)):
                item = number + place // each * len(shards)
                yield item * each + place % each, likely

    def _of_server(
        self, server: ServerAnswerer, name: str, items: Sequence[Prompt], params: AnswerParams, state: str
    ) -> list[Path]:
        """The shards of a server's answers."""

        def ask(wanted: Iterable[tuple[int, Prompt]]) -> Iterator[tuple[int, Rows, Spent]]:
            before = replace(server.spent)
            for item, completions in server.as_they_come(wanted, params):
                now = replace(server.spent)
                yield item, [_row(completion) for completion in completions], now - before
                before = now

        per_shard = SHARD_ROUNDS * self.run.stage.teacher.parallel
        return asked_in_shards(
            self.run, self.ranks, name, items, per_shard, ask, _table, each=params.n, state=state
        )

    def facts(self, prompts: int) -> TeacherFacts:
        """Who it is, and what all of its shards have taken, over all sessions of the run."""
        total = Spent()
        for path in sorted((self.run.folder.data / "shards").glob("*/*.parquet")):
            total += Spent(**json.loads((pq.read_schema(path).metadata or {}).get(SPENT, b"{}")))
        return {**asdict(self.identity), "prompts": prompts, **asdict(total)}  # type: ignore[typeddict-item]

    def close(self) -> None:
        self.answerer.close()


def _before_user(chat: Chat, context: tuple[Message, ...]) -> tuple[list[int], int | None]:
    """The tokens of a conversation up to the user's words, and the one that the template has after them."""
    turns = [{"role": turn.role, "content": turn.content} for turn in context]
    text = chat.render([*turns, {"role": "user", "content": MARK}], add_generation_prompt=True)
    before, _, after = text.rpartition(MARK)
    following = chat.encode(after)
    special = {number for number, token in chat.tokenizer.get_added_tokens_decoder().items() if token.special}
    return chat.encode(before), next((token for token in following if token in special), None)


def _table(rows: Rows, spent: Spent) -> pa.Table:
    """The content of a shard."""
    return pa.Table.from_pylist(rows, ANSWER).replace_schema_metadata({SPENT: json.dumps(asdict(spent))})


def _row(completion: Completion) -> dict[str, Any]:
    likely = completion.likely
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.tokens),
        "likely": likely
        and [
            {"piece": piece, "top": [other for other, _ in top], "logprobs": [value for _, value in top]}
            for piece, top in likely
        ],
    }


def _completion(row: dict[str, Any]) -> Completion:
    return Completion([], [], row["finish_reason"], row["text"])


def _likely_of(shard: Path) -> Iterator[Likely | None]:
    with samples.reading(shard, "remove it, and repeat the command to make it again"):
        for batch in pq.ParquetFile(shard).iter_batches(1, columns=["likely"]):
            for value in batch.column("likely").to_pylist():
                yield value and [
                    (token["piece"], list(zip(token["top"], token["logprobs"], strict=True)))
                    for token in value
                ]
