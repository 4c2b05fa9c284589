"""`r1pipe run --multirun`: which runs it makes, what ends it, what running it again does."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from fakes import House, build_house

from r1pipe.cli.sweep import InThisProcess

SWEEP = ("run", "--multirun", "stage=cold_start", "parent=bundled", "stage.optim.lr=1e-4,3e-4", "seed=0,1")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return build_house(tmp_path, monkeypatch)


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def settings_of(house: House) -> list[tuple[float, int]]:
    """Learning rates and seeds, sorted."""
    configs = [config_of(run) for run in house.runs()]
    return sorted((config["stage"]["optim"]["lr"], config["seed"]) for config in configs)


def starts_of(house: House) -> list[int]:
    return [len((run / "begun").read_text().split()) for run in house.runs()]


def test_every_combination_is_a_run_and_the_table_shows_what_differs(
    house: House, capsys: pytest.CaptureFixture
) -> None:
    assert house.call(*SWEEP) == 0
    assert settings_of(house) == [(1e-4, 0), (1e-4, 1), (3e-4, 0), (3e-4, 1)]
    assert len({(run / "sweep").read_text() for run in house.runs()}) == 1
    table = capsys.readouterr().out
    assert "stage.optim.lr" in table and all(run.name in table for run in house.runs())
    assert house.call(*SWEEP) == 0
    assert starts_of(house) == [1, 1, 1, 1], "what has finished is skipped"
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("values", ["choice(1,2)", "range(1,3)", "1,2"])
def test_hydras_syntax_for_sweeps(house: House, values: str, capsys: pytest.CaptureFixture) -> None:
    assert house.call("run", "-m", "--dry-run", "stage=base", f"seed={values}", "model=glob(l*)") == 0
    commands = capsys.readouterr().out.splitlines()
    assert [command.split()[:5] for command in commands] == [
        ["r1pipe", "run", "stage=base", f"seed={seed}", "model=laptop"] for seed in (1, 2)
    ]
    assert house.runs() == []


def test_a_job_that_fails_ends_the_sweep_and_the_same_command_continues_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "crash")
    assert house.call(*SWEEP) == 1
    assert settings_of(house) == [(1e-4, 0)]
    monkeypatch.delenv("FAKE")
    assert house.call(*SWEEP) == 0
    assert sorted(starts_of(house)) == [1, 1, 1, 2]


def test_ctrl_c_ends_the_sweep_with_its_job(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "wait")

    def interrupt() -> None:
        while not list(house.root.glob("*/waiting")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        (house.root / "go").touch()  # the job has caught it by then, or finishes: the sweep ends either way

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert house.call(*SWEEP) == 130
    thread.join()
    assert settings_of(house) == [(1e-4, 0)]


def test_a_half_done_run_of_another_config_stands_in_no_ones_way(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "killed")
    assert house.call(*SWEEP) == 1
    monkeypatch.delenv("FAKE")
    assert house.call(*SWEEP[:4], "stage.optim.lr=5e-4,1e-4") == 0
    assert settings_of(house) == [(1e-4, 0), (5e-4, 0)]
    assert sorted(starts_of(house)) == [1, 2]


def test_a_sweeper_gets_each_jobs_accuracy(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an optimizing sweeper, such as Optuna's, chooses the next job by."""
    returned, launch = [], InThisProcess.launch
    monkeypatch.setattr(
        InThisProcess, "launch", lambda *jobs, **at: returned.extend(launch(*jobs, **at)) or returned
    )
    assert house.call("run", "-m", "stage=base") == 0
    assert [job.return_value for job in returned] == [0.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "stage=base", "seed=0,1"), "'seed=0,1' gives several values; `r1pipe run --multirun` runs"),
        (("run", "-m", "stage=base", "seed=0,-1"), "seed=-1 must be 0 or more"),
        (("run", "-m", "stage=base", "sed=0,1"), "sed is no key of the config; did you mean seed?"),
        (("run", "-m", "seed=0,1"), "which stage? give stage=NAME"),
        (("run", "-m", "stage=base", "seed=interval(0,1)"), "BasicSweeper does not support sweep type"),
        (
            ("run", "-m", "stage=base", "hydra/sweeper=optuna", "seed=0,1"),
            "Could not find 'hydra/sweeper/optuna'",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    house: House, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert house.call(*words) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert house.runs() == []
