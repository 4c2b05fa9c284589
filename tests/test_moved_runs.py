"""Run folders that were copied or moved, alone or with their root: eval, lineage, export, chat and resume."""

import json
import shutil
from pathlib import Path

import pytest
from fakes import House

from r1pipe.cli import scripts
from r1pipe.config import read_config
from r1pipe.core.errors import CheckpointError
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
