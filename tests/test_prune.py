"""`r1pipe prune`: nothing goes without --yes, and nothing that a run which stays was made from."""

import os
import time
from pathlib import Path

import pytest
from fakes import House
from runfolders import build

from r1pipe.cli import prune
from r1pipe.core.paths import RunFolder
from r1pipe.runs.locks import Lock

DAY_S = 86400


@pytest.fixture
def runs(house: House) -> dict[str, Path]:
    """base -> cold_start -> two runs of grpo; rejection_sft from the base, reading the newer grpo."""
    made = {stage: build(house.root, stage) for stage in ("base", "cold_start", "rejection_sft")}
    return {
        **made,
        "older": build(house.root, "grpo", run_id="grpo--1"),
        "newer": build(house.root, "grpo", run_id="grpo-0"),
    }


def there(runs: dict[str, Path]) -> set[str]:
    return {name for name, path in runs.items() if path.exists()}


def test_without_yes_nothing_goes(house: House, runs: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert house.call("prune", "grpo", "--keep-last", "0") == 0
    out = capsys.readouterr().out
    assert there(runs) == set(runs)
    lines = {line.split()[1]: line for line in out.splitlines()[:-1]}
    assert lines[runs["older"].name].startswith("remove ") and " MB  " in lines[runs["older"].name]
    kept = lines[runs["newer"].name]
    assert kept.startswith("kept ") and f"{runs['rejection_sft'].name} was made from it" in kept
    assert "would remove 1 of 2 runs" in out and "--yes" in out


def test_a_parent_of_weights_or_data_stays(house: House, runs: dict[str, Path]) -> None:
    assert house.call("prune", "base", "cold_start", "grpo", "--yes") == 0
    assert there(runs) == set(runs) - {"older"}
    assert not (house.root / prune.TRASH).exists()
    # the config alone names its parents while a run is not done; a damaged one still holds the names
    record = runs["rejection_sft"] / "record.json"
    (runs["rejection_sft"] / "config.json").write_text(record.read_text()[:-40])
    record.unlink()
    assert house.call("prune", "base", "cold_start", "grpo", "--yes") == 0
    assert there(runs) == set(runs) - {"older"}


def test_runs_that_only_runs_that_go_were_made_from_go_too(house: House, runs: dict[str, Path]) -> None:
    assert house.call("prune", "pipeline=elsewhere", "--yes") == 0
    assert there(runs) == set(runs)
    assert house.call("prune", "pipeline=laptop", "--yes") == 0
    assert there(runs) == set()


def test_conditions_hold_together(house: House, runs: dict[str, Path]) -> None:
    (runs["rejection_sft"] / "record.json").unlink()
    assert house.call("prune", "grpo", "--unfinished", "--yes") == 0
    assert house.call("prune", "--unfinished", "--older-than", "1", "--yes") == 0
    assert there(runs) == set(runs)
    before = time.time() - 2 * DAY_S
    for path in [runs["rejection_sft"], *runs["rejection_sft"].rglob("*")]:
        os.utime(path, (before, before))
    assert house.call("prune", "--unfinished", "--older-than", "3", "--yes") == 0
    assert there(runs) == set(runs)
    assert house.call("prune", "--unfinished", "--older-than", "1", "--yes") == 0
    assert there(runs) == set(runs) - {"rejection_sft"}
    assert house.call("prune", "--keep-last", "1", "--yes") == 0
    assert there(runs) == set(runs) - {"rejection_sft", "older"}


def test_a_run_that_is_running_stays(
    house: House, runs: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    lock = Lock(RunFolder(runs["rejection_sft"]))
    lock.take()
    try:
        assert house.call("prune", "rejection_sft", "--yes") == 0
        assert f"process {os.getpid()}" in capsys.readouterr().out
        assert there(runs) == set(runs)
    finally:
        lock.release()
    assert house.call("prune", runs["rejection_sft"].name, "--yes") == 0
    assert there(runs) == set(runs) - {"rejection_sft"}
