"""Which run a config belongs to: what resumes, what starts a new run, what is refused and how it differs."""

import json
from pathlib import Path

import pytest
from fakes import House

from r1pipe.config import RunConfig, to_mapping
from r1pipe.config.changes import ABSENT, SAME_BITS, SAME_WITHIN_ROUNDING, Change, changes, listed
from r1pipe.config.compose import compose
from r1pipe.config.groups import flat, upwards
from r1pipe.launch import pipeline


def begin(house: House, monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    """A run that was killed after its first checkpoint."""
    monkeypatch.setenv("FAKE", "killed")
    assert house.call("run", *words) == 1
    monkeypatch.setenv("FAKE", "ok")
    return house.runs()[-1]


def told(capsys: pytest.CaptureFixture) -> str:
    """The last line on standard error."""
    return capsys.readouterr().err.splitlines()[-1]


def edited(run: Path, **changed: object) -> None:
    """Write other values into the stage of a run's config.json; None takes the key away."""
    config = json.loads((run / "config.json").read_text())
    config["stage"] |= changed
    config["stage"] = {key: value for key, value in config["stage"].items() if value is not None}
    (run / "config.json").write_text(json.dumps(config))


def test_a_changed_config_is_refused_with_what_changed_and_both_remedies(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = begin(house, monkeypatch, "stage=cold_start")
    before = (run / "config.json").read_bytes()
    assert house.call("run", "stage=cold_start", "stage.optim.lr=0.1", "stage.save_every=3") == 2
    line = told(capsys)
    assert f"{run.name} is unfinished (at step 1) with another config: stage.optim.lr: 0.0002 -> 0.1;" in line
    assert "give the old values" in line and "--fresh" in line and "save_every" not in line
    assert house.runs() == [run] and (run / "config.json").read_bytes() == before
    assert house.call("run", "stage=cold_start", "stage.optim.lr=0.1", "--fresh") == 0
    assert len(house.runs()) == 2
    assert house.call("run", "stage=cold_start") == 0, "the old values still find their run"
    assert len(house.runs()) == 2 and (run / "record.json").exists()


def test_after_a_newer_run_has_finished_an_abandoned_one_stands_in_nobodys_way(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned = begin(house, monkeypatch, "stage=cold_start")
    abandoned.rename(abandoned.with_name("cold_start-s0-20000101-000000-0000"))
    assert house.call("run", "stage=cold_start", "stage.optim.lr=0.1", "--fresh") == 0
    assert house.call("run", "stage=cold_start", "stage.optim.lr=0.2") == 0
    assert len(house.runs()) == 3


def test_keys_that_may_change_go_on_with_the_new_values_and_the_old_ones_are_kept(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = begin(house, monkeypatch, "stage=cold_start")
    saves = json.loads((run / "config.json").read_text())["stage"]["save_every"]
    capsys.readouterr()
    words = ("stage.save_every=7", "engine.ranks=1", "stage.keep=5")
    assert house.call("run", "stage=cold_start", *words) == 0
    said = capsys.readouterr().err
    told = f"engine.ranks: 2 -> 1, stage.save_every: {saves} -> 7, stage.keep: 2 -> 5"
    assert f"resumes from step 1 with {told} (--fresh" in said
    assert house.runs() == [run]
    config = json.loads((run / "config.json").read_text())
    assert (config["stage"]["save_every"], config["engine"]["ranks"], config["stage"]["keep"]) == (7, 1, 5)
    [row] = [json.loads(line) for line in (run / "config_history.jsonl").read_text().splitlines()]
    assert row["changed"]["stage.save_every"] == [saves, 7] and row["changed"]["engine.ranks"] == [2, 1]


def test_an_old_run_folder_that_lacks_a_key_is_refused_without_a_traceback(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = begin(house, monkeypatch, "stage=cold_start")
    edited(run, mtp_weight=None, a_key_of_then=3)
    assert house.call("run", "stage=cold_start") == 2
    line = told(capsys)
    assert f"stage.mtp_weight: {ABSENT} -> 0.3, stage.a_key_of_then: 3 -> {ABSENT}; give" in line
    edited(run, mtp_weight=0.3, a_key_of_then=None, keep=None)
    assert house.call("run", "stage=cold_start") == 0, "a key that may change may also be new"
    assert house.runs() == [run]


def test_a_changed_parent_is_a_changed_config(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    house.call("run", "stage=cold_start")
    begin(house, monkeypatch, "stage=grpo")
    house.call("run", "stage=cold_start")  # a newer one, with other weights
    assert house.call("run", "stage=grpo") == 2
    assert "with another config: weights_from: " in told(capsys)
    assert house.call("run", "stage=grpo", "--fresh") == 0


def test_reproduce_refuses_with_a_remedy_of_its_own_and_takes_what_is_done(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert house.call("run", "stage=base") == 0
    begin(house, monkeypatch, "stage=cold_start")
    assert house.call("reproduce", "stage.optim.lr=0.1") == 2
    line = told(capsys)
    assert "cold_start-" in line and "stage.optim.lr: 0.0002 -> 0.1" in line
    assert "pipeline=NAME" in line and "--fresh" not in line


def test_reproduce_does_nothing_again_for_a_key_that_changes_no_bit(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert house.call("run", "stage=base") == 0
    assert house.call("run", "stage=cold_start") == 0
    before = house.runs()
    monkeypatch.setenv("FAKE", "crash")
    assert house.call("reproduce", "stage.save_every=3") == 1
    assert [run.name.partition("-")[0] for run in house.runs()][len(before) :] == ["grpo"]


def test_reproduce_goes_on_with_other_ranks_after_what_is_done_with_the_old_ones(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert house.call("run", "stage=base") == 0
    begin(house, monkeypatch, "stage=cold_start")
    monkeypatch.setattr(pipeline, "configs_of", first_two)
    words = ["engine.ranks=1", f"root={house.root}", "tracking=none"]
    assert pipeline.reproduce(words).code == 0
    said = capsys.readouterr().err
    assert "base-" in said and "is already done, with other values: engine.ranks: 2 -> 1" in said
    assert "resumes from step 1 with engine.ranks: 2 -> 1" in said and len(house.runs()) == 2


def first_two(words: list[str]) -> list[RunConfig]:
    return [compose([*words, f"stage={stage}"]).config for stage in ("base", "cold_start")]


def test_a_measurement_that_was_cut_off_stands_in_no_other_ones_way(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.call("run", "stage=cold_start")
    monkeypatch.setenv("FAKE", "killed")
    house.call("eval", "cold_start")
    monkeypatch.setenv("FAKE", "ok")
    assert house.call("eval", "cold_start", "stage.eval.problems=9") == 0
    assert len(house.runs("evaluate")) == 2


def test_a_dry_run_holds_up_no_other_config(house: House) -> None:
    assert house.call("run", "stage=cold_start", "--dry-run") == 0
    assert house.call("run", "stage=cold_start", "stage.optim.lr=0.1") == 0
    assert len(house.runs()) == 2


def test_a_config_json_that_cannot_be_read_is_nobodys_and_told(
    house: House, capsys: pytest.CaptureFixture
) -> None:
    broken = house.root / "cold_start-s0-20260101-000000-0000" / "config.json"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"seed": 0, "st')
    assert house.call("run", "stage=cold_start") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == [
        f"warning: {broken} cannot be read, so its run is ignored; fix that file, or move the folder away"
    ]
    assert house.call("run", "stage=cold_start", "seed=1") == 0
    assert "warning" not in capsys.readouterr().err, "another stage or seed is not concerned"
    assert house.call("sync") == 1
    out, err = capsys.readouterr()
    assert "MLflow has 0 runs" in out and err.splitlines() == told
    broken.unlink()
    assert house.call("sync") == 0


def test_the_keys_that_may_change_are_keys_of_some_config() -> None:
    known = set()
    of_files = ["stage=distill", "data=files", "data.path=FILE"]
    with_teacher = ["stage=distill", "teacher=base", "stage.transfer=rl", "stage.extract=distribution"]
    with_judge = ["stage=all_scenario", "judge=base", "stage.rewards.weights.judge=1"]
    ranking = ["stage=distill", "teacher=base", "stage.transfer=ranking"]
    for words in (["stage=cold_start"], ["stage=grpo"], of_files, with_teacher, ranking, with_judge):
        for key, _ in flat(to_mapping(compose(words).config)):
            known |= {*upwards(key)}
    assert {*SAME_BITS, *SAME_WITHIN_ROUNDING} <= known
    assert all({**SAME_BITS, **SAME_WITHIN_ROUNDING}.values()), "each says why"


def test_max_steps_may_not_change_where_the_learning_rate_follows_it() -> None:
    assert not Change("stage.max_steps", 36, 72).allowed
    assert Change("tracking.enabled", True, False).same_bits
    assert Change("engine.ranks", 1, 2).allowed and not Change("engine.ranks", 1, 2).same_bits


def test_parents_differ_by_hash_alone_and_many_changes_are_counted() -> None:
    parent = {"stage": "base", "run_id": "a", "checkpoint": "/a", "hash": "ab" * 32}
    old = {"weights_from": parent, "reads_from": {"grpo": parent}, "stage": {str(i): i for i in range(9)}}
    moved = {**parent, "run_id": "b", "checkpoint": "/b"}
    new = {**old, "weights_from": moved, "reads_from": {"grpo": {**moved, "hash": "cd" * 32}}}
    assert [str(change) for change in changes(old, new)] == ["reads_from.grpo: abababababab -> cdcdcdcdcdcd"]
    found = changes(old, {**old, "stage": {str(i): -i for i in range(9)}})
    assert listed(found).startswith("stage.1: 1 -> -1, ") and listed(found).endswith(", and 3 more")
