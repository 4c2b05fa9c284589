"""`r1pipe audit` answers its checklist from records or says what is missing, and cards say the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from lineages import checkpoint, made
from typer.testing import CliRunner

from r1pipe.cli import cards
from r1pipe.cli.audit import ANSWERS, read_checklist
from r1pipe.cli.commands import app
from r1pipe.config import to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Demonstration, Prompt
from r1pipe.data.screening import Screening
from r1pipe.runs import lineage, samples
from r1pipe.runs.files import write_json

MEASURED = {
    "data": "world",
    "split": "test",
    "k": 4,
    "problems": 2,
    "unscored": 0,
    "pass_at_1": 0.5,
    "pass_at_1_ci": [0.4, 0.6],
    "general_score": 0.75,
    "general_by_kind": {"facts": 0.75},
    "refusal_rate": 0.9,
    "safe_answer_rate": 1.0,
}
WORDS = [
    Demonstration(
        Prompt(f"w-{i}", "word", "en", f"{i}?", source="world"), "4", source="world", licence="Apache-2.0"
    )
    for i in range(3)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cold start of the bundled base of which everything is on record."""
    root = tmp_path_factory.mktemp("audited")
    config = compose(["stage=cold_start"]).config
    more: dict[str, Any] = {
        "metrics": MEASURED,
        "wall_s": 100.0,
        "code": {"revision": "abc1234", "dirty": False},
    }
    more["data"] = {"name": "world", "kind": "world"}
    made(root, "cold_start-s0-1", "cold_start", lineage.bundled(), config=to_mapping(config), **more)
    run = RunFolder(root / "cold_start-s0-1")
    samples.write_trained_on(run.trained_on, [(one, "reasoning", 9) for one in WORDS])
    screening = Screening(config.screening)
    screening.demonstrations(WORDS)
    write_json(run.screening, screening.report())
    evaluated = {"general_scored_by": "the hidden truth", "reasoning": ["w-9", "w-1"], "general": ["f-1"]}
    write_json(run.evaluated, evaluated)
    return root


def audited(root: Path, *words: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The exit code, what is missing and the items by name."""
    line = ["audit", "cold_start", f"root={root}", "pipeline=p", "--json", *words]
    result = CliRunner().invoke(app, line, catch_exceptions=False, standalone_mode=False)
    found = json.loads(result.output)
    return result.return_value, found["missing"], {item["name"]: item for item in found["items"]}


def test_records_answer_every_item_without_a_gap(root: Path) -> None:
    code, missing, items = audited(root)
    assert (code, missing) == (0, []) and set(items) == set(ANSWERS)
    lines = {name: " | ".join(item["lines"]) for name, item in items.items()}
    assert lines["code"] == "cold_start: abc1234 | pretrain: b9be92e69d with changes outside the code"
    assert (
        "cold_start: AdamW" in lines["scheduler"] and "pretrain: AdamW, 0.003 to 0.0001" in lines["scheduler"]
    )
    assert (
        lines["data_sources"]
        == "responses: world 3 | prompts: world 3 | pretrain: 28,672,000 tokens of world"
    )
    assert lines["licences"] == "Apache-2.0 | Apache-2.0 3"
    assert items["reward_models"]["status"] == items["collection"]["status"] == "not applicable"
    assert lines["contamination"].startswith(
        "1 of 3 prompts measured on are among 3 trained on |   cold_start-s0-1: 1"
    )
    assert lines["helpfulness"] == "75.0% of general answers right (facts 75.0%), scored by the hidden truth"
    assert lines["harmlessness"].startswith("harmful requests refused 90.0%, harmless ones answered 100.0%")
    claims = "pretrain: 7 of its first 5,000 documents (ChatGPT 7); action: count"
    assert lines["self_identification"] == f"cold_start: 0 of 3 rows; action: count | {claims}"
    assert "made elsewhere: pretrain bundled, 36m13s of its job" in lines["cost"]


@pytest.mark.parametrize(
    ("file", "without", "gaps"),
    [
        ("data/screening.json", None, ["self_identification", "personal_data"]),
        ("data/evaluated.json", None, ["helpfulness", "harmlessness", "contamination"]),
        ("record.json", "code", ["code"]),
        ("record.json", "config", ["scheduler"]),
        ("record.json", "metrics", ["evaluation", "helpfulness", "harmlessness"]),
        ("data/trained_on.parquet", None, None),
    ],
)
def test_what_no_record_has_is_missing(
    root: Path, file: str, without: str | None, gaps: list[str] | None
) -> None:
    path = root / "cold_start-s0-1" / file
    before = path.read_bytes()
    try:
        if without:
            write_json(path, {key: value for key, value in json.loads(before).items() if key != without})
        else:
            path.unlink()
        code, missing, items = audited(root)
    finally:
        path.write_bytes(before)
    of_data = [
        "data_sources",
        "licences",
        "data_samples",
        "collection",
        "teachers_and_judges",
        "contamination",
    ]
    assert code == 1 and missing == (gaps or [*of_data, "self_identification", "personal_data"])
    assert all(items[name]["lines"] for name in missing), "each says why"


def test_harmless_requests_alone_do_not_measure_harmlessness(root: Path) -> None:
    path = root / "cold_start-s0-1" / "record.json"
    before = path.read_bytes()
    try:
        record = json.loads(before)
        write_json(path, {**record, "metrics": {**MEASURED, "refusal_rate": None}})
        _, missing, items = audited(root)
    finally:
        path.write_bytes(before)
    assert missing == ["harmlessness"]
    told = "no harmful request was asked; harmless ones answered 100.0%, scored by the hidden truth"
    assert items["harmlessness"]["lines"] == [told]


def test_documents_alone_have_no_empty_lines(tmp_path: Path) -> None:
    """The bundled base learned from documents: there are no rows to share out."""
    line = ["provenance", "bundled", f"root={tmp_path}"]
    shown = CliRunner().invoke(app, line, catch_exceptions=False, standalone_mode=False).output
    assert "28,672,000" in shown and "Shares" not in shown and ":" not in shown
    line = ["audit", "bundled", f"root={tmp_path}", "--json"]
    told = json.loads(CliRunner().invoke(app, line, catch_exceptions=False, standalone_mode=False).output)
    items = {item["name"]: item for item in told["items"]}
    assert items["data_sources"]["lines"] == ["pretrain: 28,672,000 tokens of world"]
    cards.write(tmp_path, list(lineage.ancestors(lineage.bundled())))
    text = (tmp_path / cards.DATA_CARD).read_text()
    assert "Shares" not in text and "28,672,000 tokens of world" in text


def test_weights_from_elsewhere_leave_gaps(tmp_path: Path) -> None:
    made(tmp_path, "cold_start-s0-1", "cold_start", checkpoint(tmp_path / "imported" / "x", "external", "x"))
    code, missing, items = audited(tmp_path)
    assert code == 1 and {"lineage", "data_sources", "licences"} <= set(missing)
    assert items["data_sources"]["lines"][0] == "cold_start-s0-1: it keeps no list of its samples"
    assert "x: it has no record: imported, or not finished" in items["data_sources"]["lines"]


def test_a_checklist_of_ones_own(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("cost: {required: false, question: 'Dear?'}\n")
    code, missing, items = audited(root, "--checklist", str(path))
    assert (code, missing, list(items)) == (0, [], ["cost"]) and items["cost"]["question"] == "Dear?"
    wrong = {
        "costs: {required: true, question: a}": "no item is called costs; did you mean cost",
        "cost: {required: 1, question: a}": "cost must have required: true or false",
        "[": "cannot be read",
        "- 1": "must be a mapping",
    }
    for text, told in wrong.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_checklist(path)


def test_both_cards_are_in_hugging_faces_format_and_say_what_is_missing(root: Path, tmp_path: Path) -> None:
    found = list(lineage.ancestors(lineage.checkpoint_of_run(RunFolder(root / "cold_start-s0-1"))))
    cards.write(tmp_path, found)
    model = ModelCard.load(tmp_path / cards.MODEL_CARD)
    assert model.data.license == "apache-2.0" and model.data.datasets == ["world"]
    results = {result.metric_type: result.metric_value for result in model.data.eval_results}
    assert results["pass_at_1"] == 0.5 and results["refusal_rate"] == 0.9
    assert model.text.count("*not recorded*") == 1 and "stage.eval.identity=50" in model.text  # not asked for
    assert str(root) not in model.text
    data = DatasetCard.load(tmp_path / cards.DATA_CARD)
    assert data.data.language == ["en", "zh"], "rows in English, and documents in both"
    assert data.data.size_categories == "n<1K"
    assert "- source: world 100.0%" in data.text and "`w-0`, from world:\n\n    0?\n\n    4" in data.text

    outside = checkpoint(tmp_path / "imported" / "x", "external", "SmolLM2")
    gap = made(tmp_path, "cold_start-s0-1", "cold_start", outside)
    (tmp_path / "out").mkdir()
    cards.write(tmp_path / "out", list(lineage.ancestors(gap)))
    text = (tmp_path / "out" / cards.MODEL_CARD).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "SmolLM2" and "license" not in front
    assert text.count("*not recorded*") > 5
