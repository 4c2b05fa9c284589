"""Where samples came from: stored rows, and what a checkpoint was trained on."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lineages import checkpoint, made
from typer.testing import CliRunner

from r1pipe.chat.answerer import Identity, Spent
from r1pipe.cli.commands import app
from r1pipe.core.errors import CheckpointError, DataError
from r1pipe.core.types import Demonstration, Message, Prompt
from r1pipe.runs import lineage, samples
from r1pipe.runs.lineage import training_data

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


# --- what a checkpoint was trained on


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a rejection sampling that trained on one sample and an instruction, its sampler, which
    learned by reinforcement from an imported checkpoint, and the bundled base."""
    root = tmp_path_factory.mktemp("family")
    imported = root / "imported" / "somebody"
    sampler = made(root, "grpo-s0-1", "grpo", weights=checkpoint(imported, "external", "somebody"))
    rollouts = [
        {
            "prompt_id": "w-1",
            "task": "word",
            "language": "en",
            "completion": "a",
            "length": 5,
            "trained": trained,
        }
        | {"source": source, "licence": licence}
        for trained, source, licence in (
            (True, "a.jsonl:7", "MIT"),
            (True, "a.jsonl:8", None),
            (False, "b:1", None),
        )
    ]
    path = root / "grpo-s0-1" / "rollouts" / "step-1.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rollouts), path)
    made(root, "rejection_sft-s0-1", "rejection_sft", weights=lineage.bundled(), reads=[sampler])
    general = Demonstration(Prompt("i-1", "writing", "en", "Hi"), "Hello", source="b.json:1")
    learned = [(replace(SAMPLE, teacher=None, judge=None), "reasoning", 12), (general, "general", 8)]
    samples.write_trained_on(root / "rejection_sft-s0-1" / "data" / "trained_on.parquet", learned)
    return root


def told(*words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False, standalone_mode=False)
    return json.loads(result.output)


def test_provenance_sums_up_the_whole_ancestry_and_unknown_is_a_row_of_its_own(family: Path) -> None:
    found = told("provenance", "rejection_sft-s0-1", f"root={family}", "pipeline=p")
    runs = {run["run_id"]: (run["edge"], run["kind"], run["rows"], run["tokens"]) for run in found["runs"]}
    assert runs == {
        "rejection_sft-s0-1": ("weights", "demonstrations", 2, 20),
        "bundled": ("weights", "documents", None, 14000 * 4 * 512),
        "grpo-s0-1": ("data", "rollouts", 2, 10),
        "somebody": ("data", "unknown", None, None),
    }
    shares = {
        name: {share["value"]: share["rows"] for share in shares} for name, shares in found["shares"].items()
    }
    assert found["rows"] == 4
    assert shares["source"] == {"sampled:grpo-s0-1": 2, "sampled:grpo-0": 1, "b.json": 1}
    assert shares["prompt_source"] == {"a.jsonl": 3, None: 1}, "rows of one file count together"
    assert shares["licence"] == {"MIT": 2, None: 2}
    assert shares["language"] == {"en": 3, "zh": 1} and shares["task"] == {"word": 3, "writing": 1}
    assert shares["stage"] == {"rejection_sft": 2, "grpo": 2} and shares["edge"] == {"weights": 2, "data": 2}


@pytest.mark.parametrize(
    ("stage", "words", "kind"),
    [
        ("all_scenario", {}, "rollouts"),
        ("distill", {"transfer": "rl"}, "rollouts"),
        ("distill", {"transfer": "sft"}, "unknown"),
    ],
)
def test_whoever_scored_or_taught_rollouts_is_named(
    stage: str, words: dict[str, str], kind: str, tmp_path: Path
) -> None:
    taught = asdict(Identity("checkpoint", "t", "2", "MIT")) | {"prompts": 3} | asdict(Spent())
    who = {"metrics": {"judge": {"name": "j", "version": "1"}}, "teacher": taught}
    last = made(tmp_path, f"{stage}-0", stage, weights=lineage.bundled(), config={"stage": words}, **who)
    path = tmp_path / f"{stage}-0" / "rollouts" / "step-1.parquet"
    path.parent.mkdir()
    rows = {"prompt_id": ["a", "b", "c"], "length": [1, 2, 3], "score_judge": [0.5, None, None]}
    pq.write_table(pa.table(rows | {"score_judge_harmless": [None, 1.0, None]}), path)
    own = next(iter(lineage.ancestors(last)))
    found = training_data.of_run(own, "weights")
    assert found.kind == kind
    if kind == "rollouts":
        assert found.counts["teacher"] == {"t": 3} and found.counts["judge"] == {"j 1": 2, "none": 1}
        assert training_data.prompt_ids(own) == {"a", "b", "c"}


def test_the_way_of_one_sample_is_listed(family: Path) -> None:
    where = ("rejection_sft-s0-1", f"root={family}", "pipeline=p")
    places = told("provenance", *where, "--sample", "w-1")
    assert [(place["run_id"], place["file"]) for place in places] == [
        ("rejection_sft-s0-1", "data/trained_on.parquet"),
        *[("grpo-s0-1", "rollouts/step-1.parquet")] * 3,
    ]
    assert places[0]["source"] == "sampled:grpo-0" and places[0]["checkpoint_hash"] == "9a"
    with pytest.raises(DataError, match="--sample nobody: nothing in this lineage"):
        told("provenance", *where, "--sample", "nobody")


def test_most_rows_of_the_list_have_no_texts(tmp_path: Path) -> None:
    samples.write_trained_on(tmp_path / "t.parquet", [(SAMPLE, "reasoning", 12)] * 1000)
    rows = samples.read(tmp_path / "t.parquet", [*samples.COLUMNS, "tokens"])
    assert sum(row["response"] is not None for row in rows) == samples.EXAMPLES
    assert {row["tokens"] for row in rows} == {12} and {row["source"] for row in rows} == {"sampled:grpo-0"}
