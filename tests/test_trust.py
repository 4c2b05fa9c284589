"""Where samples came from: stored rows, and what a checkpoint was trained on."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1pipe.core.errors import CheckpointError
from r1pipe.core.types import Demonstration, Message, Prompt
from r1pipe.runs import samples

PROMPT = Prompt(
    "w-1", "word", "zh", "几个？", "3", level=2, context=(Message("user", "你好"),), source="a.jsonl:7"
)
SAMPLE = Demonstration(
    PROMPT,
    "<think>\n1\n</think>\n\n3",
    "",
    "sampled:grpo-0",
    "9a",
    "77",
    "MIT",
    "v3",
    "1",
    "judge",
    ("correct",),
)


def test_a_stored_row_holds_all_of_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    samples.write(
        path, [samples.row_of(SAMPLE, "reasoning"), samples.row_of(Demonstration(PROMPT, "x"), "general")]
    )
    assert [samples.demonstration_of(row) for row in samples.read(path)] == [
        SAMPLE,
        Demonstration(PROMPT, "x"),
    ]
    assert [samples.prompt_of(row).source for row in samples.read(path)] == ["a.jsonl:7"] * 2
    assert pq.read_schema(path).names == list(samples.COLUMNS)


def test_rows_of_an_earlier_version_are_read_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    row = samples.row_of(SAMPLE, "reasoning")
    early = ("prompt_id", "task", "language", "level", "question", "answer", "response", "source")
    pq.write_table(pa.Table.from_pylist([{name: row[name] for name in early}]), path)
    (found,) = map(samples.demonstration_of, samples.read(path))
    assert found == Demonstration(replace(PROMPT, context=()), SAMPLE.response, source="sampled:grpo-0")
    path.write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match=r"samples\.parquet cannot be read .*copy the run folder again"):
        samples.read(path)


def test_a_column_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="teachers"):
        samples.write(tmp_path / "samples.parquet", [{"teachers": "v3"}])
