"""Run folders that were copied or moved, alone or with their root: eval, lineage, export, chat and resume."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from fakes import House
from forked import wait_until

from r1pipe.cli import scripts
from r1pipe.config import read_config
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.lineage.lookup import with_relocated_parents


@pytest.fixture
def made(house: House, monkeypatch: pytest.MonkeyPatch) -> House:
    """A finished cold start, and a GRPO run that was killed after its first checkpoint."""
    assert house.call("run", "stage=cold_start") == 0
    monkeypatch.setenv("FAKE", "killed")
    assert house.call("run", "stage=grpo") == 1
    monkeypatch.setenv("FAKE", "ok")
    return house


def parent_of(run: Path) -> str:
    return json.loads((run / "config.json").read_text())["weights_from"]["checkpoint"]


@pytest.mark.parametrize("copied", [True, False])
def test_a_whole_root_works_where_it_is_now(
    made: House, copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    there = House(tmp_path / "elsewhere")
    if copied:
        shutil.copytree(made.root, there.root)
    else:
        made.root.rename(there.root)
    assert there.call("run", "stage=grpo") == 0
    [run], [cold] = there.runs("grpo"), there.runs("cold_start")
    assert parent_of(run) == str(cold / "checkpoints/step-1")
    assert there.call("lineage", "grpo") == 0 and there.call("lineage", str(run)) == 0
    assert there.call("eval", "grpo") == 0
    assert parent_of(there.runs("evaluate")[0]) == str(run / "checkpoints/step-1")
    (tmp_path / "out").mkdir()  # as the script that is not run would make it
    monkeypatch.setattr(scripts, "_run", lambda name, options: asked.append(str(options)) or 0)
    assert there.call("export", "grpo", str(tmp_path / "out")) == 0 and there.call("chat", str(run)) == 0
    assert all(str(run / "checkpoints/step-1") in options for options in asked) and len(asked) == 2


def test_a_half_done_run_that_was_copied_alone_resumes_from_the_parent_that_it_names(
    made: House, tmp_path: Path
) -> None:
    [run], [cold] = made.runs("grpo"), made.runs("cold_start")
    there = House(tmp_path / "elsewhere")
    shutil.copytree(run, there.root / run.name)
    assert there.call("run", "stage=grpo") == 0
    assert [found.name for found in there.runs()] == [run.name] and (there.runs()[0] / "record.json").exists()
    assert parent_of(there.runs()[0]) == str(cold / "checkpoints/step-1")
    assert there.call("lineage", "grpo") == 0


def test_what_a_run_that_was_copied_alone_lacks_is_said(
    made: House, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    [run], [cold] = made.runs("grpo"), made.runs("cold_start")
    there = House(tmp_path / "elsewhere")
    shutil.move(run, there.root / run.name)
    shutil.rmtree(made.root)
    assert there.call("run", "stage=grpo") == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].endswith(f"copy the run folder {cold.name} to {there.root}")


def test_a_job_started_by_hand_in_a_moved_root_finds_its_parents_and_refuses_others(
    made: House, tmp_path: Path
) -> None:
    there = House(tmp_path / "elsewhere")
    made.root.rename(there.root)
    [run], [cold] = there.runs("grpo"), there.runs("cold_start")
    config = read_config(run / "config.json")
    found = with_relocated_parents(config, there.root).weights_from
    assert found is not None and found.checkpoint == str(cold / "checkpoints/step-1")
    manifest = cold / "checkpoints/step-1/manifest.json"
    manifest.write_text(json.dumps({"files": {"model.safetensors": "00"}}))
    with pytest.raises(CheckpointError, match=f"is not the checkpoint that {cold.name} had"):
        with_relocated_parents(config, there.root)


def test_a_run_whose_folder_is_moved_while_its_job_runs_is_ended_with_one_line(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAKE", "wait")

    def move() -> None:
        wait_until(lambda: list(house.root.glob("*/waiting")), "the job")
        house.runs()[0].rename(tmp_path / "away")

    thread = threading.Thread(target=move)
    thread.start()
    assert house.call("run", "stage=pretrain") == 2
    thread.join()
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "pretrain-s0" in told.splitlines()[-1] and "was moved or removed while" in told.splitlines()[-1]
    assert not house.runs(), "nothing is written where it was"
    run = house.root / told.splitlines()[-1].split(" was moved")[0].rpartition("/")[2]
    run.parent.mkdir(exist_ok=True)
    (tmp_path / "away").rename(run)
    RunFolder(run).pid.unlink()  # names this process, which is not gone as the command's would be
    monkeypatch.setenv("FAKE", "ok")
    assert house.call("run", "stage=pretrain") == 0
    assert house.runs() == [run] and (run / "record.json").exists()
