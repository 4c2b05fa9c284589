"""One scored completion, and what evaluation.parquet keeps of it.

Only what follows the thought is ever scored: `rewards.summary_of` takes it off every completion.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.core.reflection import reflects
from r1pipe.core.types import Completion, Prompt, Status
from r1pipe.data.world.truth import Truth
from r1pipe.rewards import Verdicts, score_all, summary_of, votes
from r1pipe.rewards.drop import TASK, f1
from r1pipe.runs.files import replacing
from r1pipe.runs.problems import COLUMNS, GREEDY, question_hash


class Verdict(NamedTuple):
    """One scored completion of a reasoning prompt; plain data, so that ranks can exchange it."""

    problem: int  # index of the prompt in the whole list
    draw: int  # which of its completions
    text: str
    length: int  # tokens
    truncated: bool
    correct: bool | None  # None: the verifier or the sandbox failed
    format: float
    language: float
    vote: str  # normalised answer; "" for none
    strategy: str | None
    reflects: bool = False  # finds a wrong result of its own and changes it (core.reflection)
    f1: float | None = None  # of DROP


class GeneralVerdict(NamedTuple):
    """One completion of a general prompt, with the hidden truth's verdict."""

    problem: int
    text: str
    length: int  # tokens
    truncated: bool
    truth: Truth


def score(
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    completions: list[Completion],
    verdicts: Verdicts,
    strategy_of: Callable[[Prompt, str], str] | None,
) -> list[Verdict]:
    """Verdicts on the completions of prompts `indices`, equally many per prompt, in order."""
    each = len(completions) // max(len(indices), 1)
    draws = [(i, draw) for i in indices for draw in range(each)]
    repeated = [prompts[i] for i, _ in draws]
    elections = [[c.text for c in completions[n * each : (n + 1) * each]] for n in range(len(indices))]
    voted = [vote for i, texts in zip(indices, elections, strict=True) for vote in votes(prompts[i], texts)]
    scores = score_all(repeated, completions, ["accuracy", "format", "language"], verdicts)
    return [
        Verdict(
            problem=i,
            draw=draw,
            text=completion.text,
            length=len(completion.tokens),
            truncated=completion.truncated,
            correct=score["accuracy"].value == 1.0 if score["accuracy"].status is Status.SCORED else None,
            format=score["format"].value,
            language=score["language"].value,
            vote=vote,
            strategy=strategy_of(prompt, completion.text) if strategy_of else None,
            reflects=reflects(completion.text, prompt.checker),
            f1=f1(prompt, summary_of(completion.text)) if prompt.task == TASK else None,
        )
        for (i, draw), prompt, completion, score, vote in zip(
            draws, repeated, completions, scores, voted, strict=True
        )
    ]


def rows(prompts: Sequence[Prompt], sampled: list[Verdict], greedy: list[Verdict]) -> list[dict[str, Any]]:
    """The rows of evaluation.parquet: one for each completion, the greedy one of a problem last."""
    drawn = sorted([(v.problem, v.draw, v) for v in sampled] + [(v.problem, len(sampled), v) for v in greedy])
    hashes = [question_hash(prompt.question, prompt.context) for prompt in prompts]
    return [
        {
            "prompt_id": prompts[i].id,
            "question_hash": hashes[i],
            "task": prompts[i].task,
            "language": prompts[i].language,
            "level": prompts[i].level,
            "subject": prompts[i].subject,
            "question": prompts[i].question,
            "answer": prompts[i].answer,
            "draw": verdict.draw if place < len(sampled) else GREEDY,
            "completion": verdict.text,
            "tokens": verdict.length,
            "truncated": verdict.truncated,
            "correct": verdict.correct,
            "vote": verdict.vote,
            "f1": verdict.f1,
        }
        for i, place, verdict in drawn
    ]


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """evaluation.parquet, whole or not at all."""
    types = {"int": pa.int64(), "str": pa.string(), "bool": pa.bool_(), "float": pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(found, schema), temporary, compression="zstd")
