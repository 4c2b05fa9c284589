"""Stored samples: the columns of every dataset that a run makes or trains on, and how they are read.

A row is one demonstration with its provenance. Sample: {"kind": "reasoning", "prompt_id": "gsm8k-1f…",
"task": "gsm8k", "language": "en", "level": 0, "question": "…", "answer": "42", "context": None,
"prompt_source": "gsm8k_train.jsonl:17", "response": "<think>\\n…", "source": "sampled:grpo-s0-…",
"checkpoint_hash": "9a…", "seed": "77…", "licence": "MIT", "teacher": None, "teacher_version": None,
"judge": None, "filters": '["correct", "well formed"]'}
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.core.errors import CheckpointError
from r1pipe.core.types import GENERAL_TASKS, Demonstration, Message, Prompt
from r1pipe.runs.files import replacing

Row = dict[str, Any]

SAMPLED, TEACHER, WORLD = "sampled:", "teacher:", "world"  # how `source` begins, where it is no FILE:LINE
# Column -> meaning. All are text but `level`; null: unknown, or there is none.
COLUMNS: dict[str, str] = {
    "kind": "reasoning | general | preferences | labels",
    "prompt_id": "the prompt's id: task and a hash, the same in every run",
    "task": "the task that its prompt is counted under",
    "language": "the language asked for",
    "level": "difficulty, where the task has levels",
    "question": "the prompt",
    "answer": 'gold answer; "" where a checker verifies',
    "context": "JSON list of the messages before the question",
    "prompt_source": "where the prompt came from: FILE:LINE, world, reasoning_gym …",
    "response": "what is learned",
    "source": "where the response came from: FILE:LINE, world, sampled:RUN, teacher:NAME",
    "checkpoint_hash": "manifest's hash of the checkpoint that drew the response",
    "seed": "seed of the draw",
    "licence": "licence of the response, as far as it is known",
    "teacher": "name of the teacher that wrote it (Identity.name)",
    "teacher_version": "its version (Identity.version)",
    "judge": "name and version of the judge that let it pass",
    "filters": "JSON list of the filters that it passed",
}
ORIGIN = ("source", "checkpoint_hash", "seed", "licence", "teacher", "teacher_version", "judge")
SCHEMA = pa.schema([(name, pa.int64() if name == "level" else pa.string()) for name in COLUMNS])


def kind_of(prompt: Prompt) -> str:
    return "general" if prompt.task in GENERAL_TASKS else "reasoning"


def prompt_columns(prompt: Prompt) -> Row:
    """The columns of a row that are its prompt's, without its checker."""
    context = [asdict(message) for message in prompt.context]
    return {
        "prompt_id": prompt.id,
        "task": prompt.task,
        "language": prompt.language,
        "level": prompt.level,
        "question": prompt.question,
        "answer": prompt.answer,
        "context": json.dumps(context, ensure_ascii=False) if context else None,
        "prompt_source": prompt.source or None,
    }


def row_of(demonstration: Demonstration, kind: str) -> Row:
    """A demonstration as a row."""
    return {
        "kind": kind,
        **prompt_columns(demonstration.prompt),
        "response": demonstration.response,
        **{name: getattr(demonstration, name) or None for name in ORIGIN},
        "filters": json.dumps(demonstration.filters) if demonstration.filters else None,
    }


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row, without its checker."""
    return Prompt(
        id=row["prompt_id"],
        task=row["task"],
        language=row["language"],
        question=row["question"],
        answer=row["answer"],
        level=row.get("level") or 0,
        context=tuple(Message(**message) for message in json.loads(row.get("context") or "[]")),
        source=row.get("prompt_source") or "",
    )


def demonstration_of(row: Mapping[str, Any]) -> Demonstration:
    """The demonstration of a row."""
    origin: dict[str, Any] = {name: row.get(name) for name in ORIGIN if name != "source"}
    filters = tuple(json.loads(row.get("filters") or "[]"))
    source = row.get("source") or ""
    return Demonstration(prompt_of(row), row["response"], source=source, filters=filters, **origin)


def write(
    path: Path,
    rows: Sequence[Row],
    more: Mapping[str, pa.DataType] | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
) -> None:
    """One parquet file, atomically. `more`: columns of the caller's own, after ours, and their types. Raises
    KeyError for a column that is neither."""
    schema = pa.schema([*SCHEMA, *(more or {}).items()], metadata)
    for name in {name for row in rows for name in row}:
        schema.field(name)
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema), temporary, compression="zstd")


def read(path: Path, columns: Iterable[str] | None = None) -> list[Row]:
    """The rows of a file, which an earlier version may have written with fewer columns: those are null.

    Raises CheckpointError where it cannot be read.
    """
    wanted = list(columns or COLUMNS)
    with reading(path):
        there = pq.read_schema(path).names
        rows = pq.read_table(path, columns=[name for name in wanted if name in there]).to_pylist()
    return [dict.fromkeys(wanted) | row for row in rows]


@contextmanager
def reading(path: Path, remedy: str = "copy the run folder again") -> Iterator[None]:
    """While a file of a run is read by pyarrow: raises CheckpointError where it is damaged or missing."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({said}); {remedy}") from None


# --- what a run was trained on

EXAMPLES = 100  # rows that keep their texts, spread over all: enough to see what the data is like
TEXTS = ("question", "answer", "context", "response")
TOKENS = {"tokens": pa.int64()}  # of a whole sequence


def write_trained_on(path: Path, learned: Sequence[tuple[Demonstration, str, int]]) -> None:
    """data/trained_on.parquet: a row for each (demonstration, kind, tokens) that a run learns from. Texts are
    left out but of a few: the files, and samples.parquet, have them."""
    every = max(1, len(learned) // EXAMPLES)
    rows = []
    for number, (demonstration, kind, tokens) in enumerate(learned):
        row = row_of(demonstration, kind) | {"tokens": tokens}
        rows.append(row if number % every == 0 else row | dict.fromkeys(TEXTS))
    write(path, rows, TOKENS)
