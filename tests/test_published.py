"""R1's published numbers: whole, marked as published, and beside runs that measured the same benchmark."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from runfolders import build, write_json

from r1pipe.cli import compare
from r1pipe.cli.report import write_report
from r1pipe.cli.report.load import load_runs
from r1pipe.cli.report.published import beside, tables, title_of
from r1pipe.config.groups import options
from r1pipe.runs import results


def measured(root: Path, benchmark: str, run_id: str, weights: str, **metrics: object) -> None:
    folder = build(root, "evaluate", run_id=run_id)
    parent = {"stage": "grpo", "run_id": weights, "checkpoint": f"/{weights}", "hash": weights}
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"benchmark": {"name": benchmark}, "weights_from": parent})
    record = json.loads((folder / "record.json").read_text())
    known = {"benchmark": benchmark, "pass_at_1": 0.8, "pass_at_1_ci": [0.7, 0.9], "cons_at_k": None, "k": 4}
    record["metrics"] = {"problems": 30, "samples": 120, **known, **metrics}
    write_json(folder / "record.json", record)


def test_every_published_row_is_of_a_benchmark_and_whole() -> None:
    found = tables()
    assert len(found) == 3 and {row.benchmark for row in found[0].rows} <= set(options("benchmark"))
    assert len(found[0].rows) == 21
    for table in found:
        assert table.source and all(len(row.values) == len(table.models) for row in table.rows)


def test_known_numbers() -> None:
    value = {
        (model, row.benchmark, row.metric): number
        for table in tables()
        for row in table.rows
        for model, number in zip(table.models, row.values, strict=True)
        if table.title != "From stage to stage"
    }
    assert (
        value["DeepSeek-R1", "aime24", "pass@1"] == 79.8 and value["DeepSeek-R1", "math500", "pass@1"] == 97.3
    )
    assert value["R1-Distill-Qwen-7B", "math500", "pass@1"] == 92.8
    assert value["OpenAI o1-1217", "mmlu_pro", "EM"] is None


def test_our_runs_stand_among_the_published_ones(tmp_path: Path) -> None:
    measured(tmp_path, "math500", "e1", "grpo-s0", pass_at_1=0.93, cons_at_k=0.95)
    measured(tmp_path, "drop", "e2", "grpo-s0", pass_at_1=0.5, f1=0.9)
    measured(tmp_path, "svamp", "e3", "grpo-s0")
    lines = beside(load_runs(tmp_path, None, None))
    assert set(lines) == {"MATH-500", "DROP", "SVAMP"} and len(lines["SVAMP"]) == 1
    shares = [line.share for line in lines["MATH-500"]]
    assert shares == sorted(shares, reverse=True) and len(lines["MATH-500"]) == 2 + 6 + 7
    ours = [line for line in lines["MATH-500"] if not line.source]
    assert [(line.name, line.metric, line.share) for line in ours] == [
        ("grpo-s0", "cons@4", 0.95),
        ("grpo-s0", "pass@1", 0.93),
    ]
    assert {line.metric for line in lines["DROP"]} == {"pass@1", "F1", "3-shot F1"}


def test_the_report_marks_what_was_published(tmp_path: Path) -> None:
    build(tmp_path, "grpo")
    part = {"copied": 2, "searched": ["x"], "unsearched": []}
    measured(tmp_path, "math500", "e1", "grpo-s0", pass_at_1=0.424, contamination=part)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    section = text[text.index("<h2>Benchmarks</h2>") : text.index("<h2>The same prompt")]
    own = section[section.index("grpo-s0") :].split("</tr>")[0]
    assert "<b>42.4</b>" in own and "<td>2</td>" in own and "published:" not in own
    published = section[section.index("<em>DeepSeek-R1</em>") :].split("</tr>")[0]
    assert "<em>97.3</em>" in published and "published: arXiv 2501.12948v1, table 4" in published
    assert "From stage to stage" in section


def test_each_benchmark_and_checkpoint_has_a_row_of_its_own(tmp_path: Path) -> None:
    build(tmp_path, "grpo")
    measured(tmp_path, "math500", "e1", "grpo-s0")
    measured(tmp_path, "math500", "e2", "grpo-s1")
    measured(tmp_path, "aime24", "e3", "grpo-s0", contamination={"copied": 1, "searched": ["x"]})
    rows = results.rows(tmp_path)
    assert [(row["stage"], row["benchmark"], row["parent"]) for row in rows] == [
        ("grpo", None, None),
        ("evaluate", "aime24", "grpo-s0"),
        ("evaluate", "math500", "grpo-s0"),
        ("evaluate", "math500", "grpo-s1"),
    ]
    console = Console(file=io.StringIO(), width=120)
    compare.show(rows, console)
    said = console.file.getvalue()
    assert said.count("math500") == 2 and "aime24     grpo-s0" in said and "evaluate" not in said


@pytest.mark.parametrize("name", options("benchmark"))
def test_every_benchmark_has_a_title(name: str) -> None:
    assert title_of(name) not in ("", "???")
