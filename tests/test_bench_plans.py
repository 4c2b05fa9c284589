"""Finished runs beside the planner (`make bench-plan`), and what a record says of memory."""

import json
from pathlib import Path

import pytest
from bench import plans
from rl_runs import go
from runfolders import build
from tiny_runs import load_stage, tiny_run

from r1pipe.config.planning import cluster_named
from r1pipe.runs.results import stored_runs

ONE_RANK = ["cluster=laptop", "cluster.devices=1"]


def test_finished_runs_are_shown_beside_the_planner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_stage("cold_start").main(str(tiny_run(tmp_path / "cold_start-s0-1", "stage=cold_start")))
    go(tiny_run(tmp_path / "grpo-s0-1", "stage=grpo", "stage.sampling.max_tokens=8"))
    build(tmp_path, "grpo", seed=7)  # a record of an older version
    assert plans.main(["--root", str(tmp_path), *ONE_RANK]) == 0
    said = capsys.readouterr()
    assert "cold_start-s0-1" in said.out and "grpo-s0-1" in said.out and "grpo-7" not in said.out
    assert "grpo-7 is left out" in said.err
    cluster = cluster_named(ONE_RANK)
    for run in stored_runs(tmp_path, "*-s0-1"):
        row = plans.row_of(run, cluster)
        assert run.record is not None
        memory, seconds = run.record["memory_gb"], run.record["seconds"]
        assert row.memory_gb[0] == memory["training"] <= memory["all"]
        assert row.memory_gb[1] > cluster.reserved_gb and row.step_s[1] > 0
        assert row.step_s[0] * run.record["steps"] >= seconds["update"]


def test_prompts_and_completions_are_as_long_as_they_were(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "grpo-s0-1", "stage=grpo", "stage.prompts_per_step=4", "stage.group_size=4")
    config = plans.read_config(folder / "config.json")
    lines = [{"completions/mean_length": 10.0, "train/tokens_per_s": 800.0, "time/update_s": 1.0}] * 2
    found = plans.lengths(config, lines)
    assert found == {"prompt_tokens": 800 / 16 - 10, "completion_share": 10 / 32}


def test_without_a_run_that_can_be_planned_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plans.main(["--root", str(tmp_path)]) == 2
    assert "can be planned; give --root DIR" in capsys.readouterr().err
    run = build(tmp_path, "reward_model")
    record = json.loads((run / "record.json").read_text())
    assert "memory_gb" not in record
    assert plans.main(["--root", str(tmp_path), "cluster=none"]) == 2
    assert "cluster=none: no such cluster" in capsys.readouterr().err
