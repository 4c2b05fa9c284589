"""`r1pipe cost`: what all runs of a root took, beside those that made the results."""

import json
from pathlib import Path

import pytest
from runfolders import build, write_json, write_lines
from typer.testing import CliRunner

from r1pipe.cli.commands import app
from r1pipe.core.errors import ConfigError, EnvironmentProblem

TWO_CORES = 2 / 3600  # hours of two cores in a second


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A recipe's stage, made again and once interrupted, and a control; of tests/runfolders: two ranks."""
    build(tmp_path, "grpo", created="2026-01-02T10:00:00")  # 104 s
    build(tmp_path, "grpo", run_id="grpo-first", created="2026-01-01T10:00:00")  # 104 s
    build(tmp_path, "zero")  # 104 s
    build(tmp_path, "grpo", run_id="grpo-failed", finished=False, steps=40)  # 100 s
    return tmp_path


def cost(*words: str) -> str:
    result = CliRunner().invoke(app, ["cost", *words], catch_exceptions=False, standalone_mode=False)
    return result.output


def found_in(root: Path, *words: str) -> dict:
    return json.loads(cost(f"root={root}", "--json", *words))


def test_the_true_cost_stands_beside_the_pristine_one(root: Path) -> None:
    found = found_in(root, "--usd-per-hour", "2", "--watts", "50")
    seconds = {"results": 104, "controls": 104, "made_again": 104, "unfinished": 100, "done_twice": 0}
    for name, line in found["lines"].items():
        hours = seconds[name] * TWO_CORES
        assert line["hours"].get("core_hours", 0.0) == pytest.approx(hours), name
        assert line["usd"] == pytest.approx(2 * hours) and line["kwh"] == pytest.approx(0.05 * hours)
    assert found["pristine"] == {key: found["lines"]["results"][key] for key in found["pristine"]}
    assert found["true"]["hours"]["core_hours"] == pytest.approx(sum(seconds.values()) * TWO_CORES)
    assert [line["runs"] for line in found["lines"].values()] == [1, 1, 1, 1, 0]


def test_work_that_a_kill_undid_is_counted(root: Path) -> None:
    rows = [{"what": "train", "time": time} for time in (10.0, 60.0, 45.0, 104.0)]
    write_lines(root / "grpo-0" / "progress.jsonl", rows)
    found = found_in(root)
    assert found["lines"]["done_twice"] == {
        "runs": 1,
        "hours": {"core_hours": pytest.approx(15 * TWO_CORES)},
        "usd": None,
        "kwh": None,
    }


def test_a_run_that_failed_before_its_first_step_costs_too(root: Path) -> None:
    before = found_in(root)["lines"]["unfinished"]["hours"]["core_hours"]
    folder = build(root, "zero", run_id="zero-failed", finished=False)
    (folder / "metrics.jsonl").unlink()
    write_lines(folder / "progress.jsonl", [{"what": "reading", "time": 30.0}])
    after = found_in(root)["lines"]["unfinished"]["hours"]["core_hours"]
    assert after - before == pytest.approx(30 * TWO_CORES)


def test_gpus_are_not_added_to_cores_and_have_the_price_of_their_cluster(root: Path) -> None:
    on_gpus = build(root, "all_scenario")  # 112 s
    write_json(on_gpus / "env.json", {"devices": {"unit": "GPU", "count": 8}})
    found = found_in(root, "cluster=h800x2048")
    assert found["priced"] == "GPU" and found["true"]["usd"] == pytest.approx(2.0 * 8 * 112 / 3600)
    assert set(found["true"]["hours"]) == {"GPU_hours", "core_hours"}
    cheaper = found_in(root, "cluster=h800x2048", "--usd-per-hour", "1")
    assert cheaper["true"]["usd"] == pytest.approx(found["true"]["usd"] / 2)
    assert found_in(root, "cluster=laptop")["priced"] == "core"


def test_the_table(root: Path) -> None:
    shown = cost(f"root={root}", "--usd-per-hour", "36")
    lines = {line.split("  ")[0]: line.split()[-1] for line in shown.splitlines()}
    assert lines["pristine: the results alone"] == "2.08"
    assert lines["true: all of it"] == "8.24"
    assert "Staff" in shown and "undid" not in shown


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no runs under"):
        cost(f"root={tmp_path}")
    with pytest.raises(ConfigError, match="no such cluster"):
        cost(f"root={tmp_path}", "cluster=nowhere")
