"""A benchmark's questions in what its checkpoint was trained on: found, or said to be unsearched."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from runfolders import build, write_json

from r1pipe.config import BenchmarkConfig, DataConfig, ParentRef
from r1pipe.config.compose import compose
from r1pipe.core.paths import RunFolder
from r1pipe.runs.lineage.lookup import checkpoint_of_run
from r1pipe.train.evaluation.contamination import measured, search

LONG = "Every morning Aya walks {} kilometres along the river and drinks tea at a stall before she turns back"
PRIME = "Name the largest prime below 50."
QUESTIONS = [LONG.format(9) + ". How long does it take?", "What is 17 + 25?", PRIME]


@cache
def benchmark() -> BenchmarkConfig:
    found = compose(["stage=evaluate", "parent=any", "benchmark=math500"]).config.benchmark
    assert found
    return found


@cache
def gsm8k() -> DataConfig:
    return compose(["stage=cold_start", "data=gsm8k", "data.path=x"]).config.data


def trained(root: Path, stage: str, data: dict[str, Any], parent: ParentRef | None = None) -> ParentRef:
    """A finished run of this stage, on this data, from this parent."""
    run = RunFolder(build(root, stage))
    write_json(run.config, json.loads(run.config.read_text()) | {"data": data})
    record = json.loads(run.record.read_text())
    record["parents"] = {"weights": vars(parent) if parent else None, "data": []}
    write_json(run.record, record)
    return checkpoint_of_run(run)


def on_files(root: Path, questions: list[str], split: str = "train") -> dict[str, Any]:
    rows = [{"question": question, "answer": "It is so.\n#### 7"} for question in questions]
    file = root / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [replace(gsm8k().reasoning[0], path=str(file), split=split)]
    return asdict(replace(gsm8k(), path=None, reasoning=sources))


def test_copies_and_overlaps_are_counted_with_their_place(tmp_path: Path) -> None:
    part_of_it = " ".join(LONG.format(9).split()[:12])
    asked = ["What is 17+25 ?", f"{part_of_it} and swims. How far?", "What is 17 + 26?"]
    start = trained(tmp_path, "cold_start", on_files(tmp_path, asked))
    found = search(QUESTIONS, start, benchmark())
    part, line = measured(found, QUESTIONS, benchmark())
    assert (part["copied"], part["overlapping"], part["questions"], part["rows"]) == (1, 1, 3, 3)
    first, second = part["examples"]
    assert first == {"question": QUESTIONS[1], "share": 1.0, "run_id": "cold_start-0"} | {
        "found_in": "train.jsonl:1"
    }
    assert second["found_in"] == "train.jsonl:2" and 0 < second["share"] < 0.8
    assert part["searched"] == ["cold_start-0: 3 rows of data=gsm8k"] and part["unsearched"] == []
    told = "contamination: 1 of 3 questions are copied in the 3 training rows searched, 1 more share 10 words"
    assert line.startswith(told)
    assert "train.jsonl:1" in line and "\n" not in line


def test_held_out_rows_of_a_training_file_do_not_count(tmp_path: Path) -> None:
    start = trained(tmp_path, "cold_start", on_files(tmp_path, QUESTIONS, split="test"))
    assert not search(QUESTIONS, start, benchmark()).shares


def test_all_runs_behind_a_checkpoint_are_searched(tmp_path: Path) -> None:
    first = trained(tmp_path, "cold_start", on_files(tmp_path, [QUESTIONS[0]]))
    measuring = trained(tmp_path, "evaluate", on_files(tmp_path, []), first)
    last = trained(tmp_path, "grpo", {"kind": "world", "name": "world"}, measuring)
    rollouts = RunFolder(tmp_path / "grpo-0").rollouts
    rollouts.mkdir()
    pq.write_table(pa.table({"question": [QUESTIONS[1]] * 4}), rollouts / "step-1.parquet")
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"question": QUESTIONS[0], "answer": "It is so.\n#### 7"}) + "\n"
    )
    found = search(QUESTIONS, last, benchmark())
    assert {number: share for number, (share, _) in found.shares.items()} == {0: 1.0, 1: 1.0}
    assert found.sources == [
        "grpo-0: 1 rows of rollouts/step-1.parquet",
        "cold_start-0: 1 rows of data=gsm8k",
    ]
    assert found.unsearched == [
        "data=world of grpo-0 (its problems are generated, and no list of them is kept)"
    ]


def test_a_data_set_that_a_run_made_is_searched(tmp_path: Path) -> None:
    start = trained(tmp_path, "distill", {"kind": "world", "name": "world"})
    dataset = RunFolder(tmp_path / "distill-0").dataset
    dataset.parent.mkdir(exist_ok=True)
    table = {"question": ["Why?", "How?"], "response": [f"<think>\n{QUESTIONS[0]}\n</think>\n\nSo.", None]}
    pq.write_table(pa.table(table), dataset)
    [(share, text)] = search(QUESTIONS, start, benchmark()).shares.values()
    assert share == 1.0 and text.place == "samples.parquet:1"


def test_what_was_said_before_a_question_is_searched_and_rows_without_texts_are_not_counted(
    tmp_path: Path,
) -> None:
    start = trained(tmp_path, "distill", {"kind": "world", "name": "world"})
    run = RunFolder(tmp_path / "distill-0")
    run.data.mkdir(exist_ok=True)
    context = json.dumps([{"role": "user", "content": QUESTIONS[0]}])
    texts = {"context": [context, None], "question": ["And then?", None], "response": ["So.", None]}
    pq.write_table(pa.table(texts), run.trained_on)
    found = search(QUESTIONS, start, benchmark())
    assert found.shares[0][0] == 1.0 and found.rows == 1


def test_what_cannot_be_searched_is_said(tmp_path: Path) -> None:
    gone = ParentRef("pretrain", "pretrain-9", str(tmp_path / "gone"), "0" * 64)
    data = on_files(tmp_path, ["Why?"])
    start = trained(tmp_path, "cold_start", data, gone)
    (tmp_path / "train.jsonl").unlink()
    damaged = RunFolder(tmp_path / "cold_start-0").dataset
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"PAR1")
    found = search(QUESTIONS, start, benchmark())
    part, line = measured(found, QUESTIONS, benchmark())
    assert part["copied"] == 0 and part["searched"] == []
    assert line.startswith("contamination: none of the training data could be searched; not searched: data=")
    missing, broken, parent = part["unsearched"]
    assert "train.jsonl does not exist" in missing and "samples.parquet" in broken
    assert parent.endswith("is gone")


def test_a_file_that_has_changed_since_is_said(tmp_path: Path) -> None:
    start = trained(tmp_path, "cold_start", on_files(tmp_path, ["Why?"]))
    record = RunFolder(tmp_path / "cold_start-0").record
    write_json(record, json.loads(record.read_text()) | {"data": {"hash": "0" * 64}})
    [reason] = search(QUESTIONS, start, benchmark()).unsearched
    assert reason == "data=gsm8k of cold_start-0 (its files are not those that it read, or not here)"


def test_imported_weights_have_training_data_that_nobody_knows(tmp_path: Path) -> None:
    folder = tmp_path / "imported" / "model"
    write_json(folder / "config.json", {"model_type": "llama"})
    found = search(QUESTIONS, ParentRef("external", "model", str(folder), ""), benchmark())
    assert found.unsearched == [f"{folder} has no record: its training data is not known"]
