"""The walk of the stages: edges, resume, what is skipped; on stages that do not train."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import House, build_house

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.launch import pipeline
from r1pipe.runs import lineage, locks


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def record_of(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A reproduction whose first stage failed once."""
    with pytest.MonkeyPatch.context() as patch:
        house = build_house(tmp_path_factory.mktemp("house"), patch)
        patch.setenv("FAKE", "crash")
        assert house.call("reproduce", "recipe=laptop") == 1
        assert len(house.runs()) == 1, "what comes after a failed stage does not start"
        patch.delenv("FAKE")
        assert house.call("reproduce", "recipe=laptop") == 0
        yield house


def test_reproduce_runs_every_stage_once_with_its_edges(reproduced: House) -> None:
    house = reproduced
    runs = {record_of(run)["stage"]: run for run in house.runs()}
    assert set(runs) == {
        *("base", "cold_start", "grpo", "rejection_sft", "reward_model", "all_scenario"),
        *("zero", "control_sft", "expert_iteration"),
    }
    parents = {stage: record_of(run)["parents"] for stage, run in runs.items()}
    weights = {stage: edges["weights"]["run_id"] for stage, edges in parents.items()}
    assert weights["base"] == "bundled"
    assert weights["rejection_sft"] == runs["base"].name, "R1's third stage starts from the base again"
    assert [edge["run_id"] for edge in parents["rejection_sft"]["data"]] == [runs["grpo"].name]
    assert weights["all_scenario"] == weights["reward_model"] == runs["rejection_sft"].name
    assert [edge["run_id"] for edge in parents["all_scenario"]["data"]] == [runs["reward_model"].name]
    starts = {stage: len((run / "begun").read_text().split()) for stage, run in runs.items()}
    assert starts == {**dict.fromkeys(runs, 1), "base": 2}, "the run that failed once went on"


def test_reproduce_again_only_shows_the_table(reproduced: House, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in reproduced.root.rglob("*")}
    assert reproduced.call("reproduce", "recipe=laptop") == 0
    assert {path: path.stat().st_mtime_ns for path in reproduced.root.rglob("*")} == before
    shown = capsys.readouterr().out
    assert "all_scenario" in shown and str(reproduced.root / "report.html") in shown


def test_a_report_that_a_kill_has_prevented_is_made_by_the_next_call(reproduced: House) -> None:
    page = reproduced.root / "report.html"
    os.utime(page, (0, 0))  # older than the last record, as after a kill between the two
    assert reproduced.call("reproduce", "recipe=laptop") == 0
    assert page.stat().st_mtime > 0 and not page.with_suffix(".partial").exists()
    assert {card.name for card in (page.parent / "cards").iterdir()} == {"README.md", "DATA_CARD.md"}


def test_a_control_that_the_data_cannot_serve_is_left_out_and_named(capsys: pytest.CaptureFixture) -> None:
    names = {config.stage.name for config in pipeline.configs_of(["recipe=smoke", "data=gsm8k"])}
    assert {"zero", "control_sft"} < names and "pretrain" not in names
    assert "note: control pretrain is left out: data=gsm8k has no documents" in capsys.readouterr().err
    assert "pretrain" in {config.stage.name for config in pipeline.configs_of(["recipe=smoke"])}


def test_another_seed_is_another_pipeline(house: House) -> None:
    assert house.call("run", "stage=base") == 0
    assert house.call("run", "stage=cold_start") == 0
    assert house.call("run", "stage=base", "seed=1") == 0
    assert house.call("run", "stage=cold_start", "seed=1") == 0
    first, second = (record_of(run) for run in house.runs("cold_start"))
    assert (first["pipeline"], second["pipeline"]) == ("laptop-s0", "laptop-s1")
    assert first["parents"]["weights"]["run_id"] != second["parents"]["weights"]["run_id"]


def test_a_stage_without_its_parent_is_refused_in_one_line(
    house: House, capsys: pytest.CaptureFixture
) -> None:
    assert house.call("run", "stage=grpo") == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0 and "cold_start" in told and "r1pipe run stage=cold_start" in told
    assert house.runs() == []


def test_run_goes_on_with_the_unfinished_run_and_starts_anew_after_a_finished_one(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAKE", "killed")
    assert house.call("run", "stage=cold_start") == 1
    monkeypatch.setenv("FAKE", "ok")
    capsys.readouterr()
    assert house.call("run", "stage=cold_start") == 0
    assert "resumes from step 1" in capsys.readouterr().err
    assert len(house.runs()) == 1
    assert house.call("run", "stage=cold_start") == 0
    assert len(house.runs()) == 2


@pytest.mark.parametrize("refuses", [False, True])
def test_a_run_whose_command_was_killed_after_its_record_is_done_and_not_made_again(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, refuses: bool
) -> None:
    assert house.call("run", "stage=cold_start") == 0
    [run] = house.runs()
    dead = locks.Holder(socket.gethostname(), "before", [(os.getpid(), 1.0), (os.getppid(), 1.0)])
    dead.write(run / "pid")
    made_up = []

    class Mirror:
        def __init__(self, folder: Path, config: dict, say: object) -> None:
            if refuses:
                raise EnvironmentProblem("no MLflow server")
            self.folder = folder

        def finish(self) -> None:
            made_up.append(self.folder)

    monkeypatch.setattr(pipeline, "Mirror", Mirror)
    capsys.readouterr()
    assert house.call("run", "stage=cold_start", "--dry-run") == 0
    assert capsys.readouterr().out == f"{run.name}: is already done\n"
    assert house.call("run", "stage=cold_start", "stage.save_every=7") == 0
    out, err = capsys.readouterr()
    assert f"{run.name}: is already done; its command was killed" in err and "run folder:" in out
    assert house.runs() == [run] and made_up == [run] * (not refuses)
    assert ("no MLflow server" in err) == refuses
    time.sleep(1.1)  # the names of runs have seconds, and the newest is the last by name
    assert house.call("run", "stage=cold_start") == 0
    assert len(house.runs()) == 2, "once the command has returned, it starts anew"
    dead.write(run / "pid")  # and an older one is nobody's business
    assert house.call("run", "stage=cold_start") == 0
    assert len(house.runs()) == 3
    dead.write(house.runs()[-1] / "pid")
    assert house.call("run", "stage=cold_start", "stage.optim.lr=0.1") == 0
    assert len(house.runs()) == 4, "another config is another run"


@pytest.mark.parametrize("words", [["--fresh"], ["seed=1"], ["stage.optim.lr=0.1"]])
def test_another_config_or_fresh_does_not_take_over_a_run_that_has_nothing_yet(
    house: House, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("FAKE", "crash")
    house.call("run", "stage=cold_start")
    house.call("run", "stage=cold_start", *words)
    assert len(house.runs()) == 2


def test_a_changed_parent_is_another_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.call("run", "stage=cold_start")
    monkeypatch.setenv("FAKE", "crash")
    house.call("run", "stage=grpo")
    monkeypatch.setenv("FAKE", "ok")
    house.call("run", "stage=cold_start")  # a newer one, with other weights
    assert house.call("run", "stage=grpo") == 0
    assert len(house.runs("grpo")) == 2


def test_parent_takes_run_ids_paths_and_stage_names(house: House) -> None:
    house.call("run", "stage=cold_start")
    house.call("run", "stage=cold_start", "seed=1")
    old, new = house.runs("cold_start")
    for parent in (old.name, str(old), str(old / "checkpoints" / "step-1")):
        assert house.call("run", "stage=grpo", "seed=1", f"parent={parent}") == 0
        assert config_of(house.runs("grpo")[-1])["weights_from"]["run_id"] == old.name
    assert house.call("run", "stage=grpo", "seed=1", "parent=cold_start") == 0
    assert config_of(house.runs("grpo")[-1])["weights_from"]["run_id"] == new.name


@pytest.mark.parametrize(
    ("parent", "hint"),
    [
        ("colt_start", "did you mean cold_start?"),
        ("nowhere", "known: "),
        ("models:/r1", "models:/NAME@ALIAS"),
    ],
)
def test_an_unknown_checkpoint_is_one_line(
    house: House, capsys: pytest.CaptureFixture, parent: str, hint: str
) -> None:
    assert house.call("run", "stage=grpo", f"parent={parent}") == 2
    told = capsys.readouterr().err.strip()
    assert hint in told and "\n" not in told


def test_a_checkpoint_of_another_shape_is_refused_with_the_right_model(
    house: House, capsys: pytest.CaptureFixture
) -> None:
    assert house.call("run", "stage=cold_start", "model=small") == 2
    assert "give model=laptop" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "stored", "given"),
    [
        ("num_attention_heads", 4, 8),
        ("num_experts_per_tok", 2, 3),  # no tensor has another shape, but the function is another
        ("rope_theta", 10000.0, 50000.0),
        ("num_nextn_predict_layers", 0, 1),
    ],
)
def test_a_shape_that_is_not_the_parents_is_refused_with_both_values(
    house: House, capsys: pytest.CaptureFixture, key: str, stored: float, given: float
) -> None:
    assert house.call("run", "stage=base", f"model.{key}={given}") == 2
    told = capsys.readouterr().err
    assert f"has {key}={stored}, but the config has model.{key}={given}; drop" in told
    assert told.count("\n") == 1 and not house.runs()


def test_another_rope_scaling_than_the_parents_is_refused() -> None:
    published = {"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 40}}
    assert not lineage.differs(published, "rope_scaling", {"type": "yarn", "factor": 40.0})
    assert lineage.differs(published, "rope_scaling", {"type": "yarn", "factor": 4.0})
    assert lineage.differs(published, "rope_scaling", None)
    assert not lineage.differs({}, "rope_scaling", None)


def test_eval_measures_a_checkpoint_and_is_nobodys_parent(house: House) -> None:
    house.call("run", "stage=cold_start", "pipeline=mine")
    assert house.call("eval", house.runs("cold_start")[0].name, "stage.eval.problems=9") == 0
    config = config_of(house.runs("evaluate")[0])
    assert config["weights_from"]["run_id"] == house.runs("cold_start")[0].name
    assert (config["pipeline"], config["stage"]["eval"]["problems"]) == ("mine", 9)
    house.call("run", "stage=zero", "pipeline=mine")
    assert config_of(house.runs("zero")[0])["weights_from"]["run_id"] == "bundled"


def test_lineage_shows_both_kinds_of_edges_and_finds_changed_files(
    reproduced: House, capsys: pytest.CaptureFixture
) -> None:
    house = reproduced
    assert house.call("lineage", "all_scenario") == 0
    told = capsys.readouterr().out
    assert "data: reward_model" in told and "data: grpo" in told and "weights: rejection_sft" in told
    assert "bundled" in told
    (house.runs("grpo")[0] / "checkpoints" / "step-1" / "model.safetensors").write_text("other weights")
    assert house.call("lineage", "all_scenario") == 1
    assert "is not what was saved" in capsys.readouterr().out
