"""Reward models are judged before use: by accuracy, area under the curve, length; a weak one is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import House
from runfolders import build

from r1pipe.cli import compare
from r1pipe.config import ParentRef, PreferenceConfig, RLConfig, RunConfig
from r1pipe.config.compose import compose
from r1pipe.core.errors import CheckpointError
from r1pipe.runs import checkpoints, results
from r1pipe.runs import reward_model_quality as judges
from r1pipe.runs.reward_model_quality import FORCE, HARMLESS, HELPFUL, shortfalls

GOOD: dict[str, dict[str, Any]] = {
    HELPFUL: {"pairs": 300, "accuracy": 0.8, "length_correlation": 0.5},
    HARMLESS: {"labels": 300, "accuracy": 0.99, "auc": 0.999, "length_correlation": -0.03},
}
BOUNDS = PreferenceConfig(20, 0.5, {}, 1.0, 1.0, 0.6, 0.75, 0.7, False)


def write_standing(checkpoint: Path, **changed: dict[str, Any]) -> None:
    """The reward models of a checkpoint, without their weights."""
    for kind, measured in GOOD.items():
        folder = checkpoint / kind
        folder.mkdir(parents=True, exist_ok=True)
        content = measured | changed.get(kind, {})
        (folder / judges.QUALITY).write_text(json.dumps(content), encoding="utf-8")


def asking(checkpoint: Path, **preference: Any) -> RunConfig:
    """The config of an all-scenario stage that asks the models of this checkpoint."""
    config = compose(["stage=all_scenario"]).config
    assert isinstance(config.stage, RLConfig)
    stage = replace(config.stage, preference=replace(BOUNDS, **preference))
    parent = ParentRef(judges.STAGE, "reward_model-s0-x", str(checkpoint), "")
    return replace(config, stage=stage, reads_from={judges.STAGE: parent})


@pytest.mark.parametrize(
    ("kind", "name", "value", "told"),
    [
        (
            HELPFUL,
            "accuracy",
            0.55,
            "helpful: share of held-out pairs in order is 0.55, below {}min_accuracy=0.6",
        ),
        (HARMLESS, "auc", 0.7, "harmless: area under the ROC curve is 0.7, below {}min_auc=0.75"),
        (HELPFUL, "length_correlation", 0.75, "length is 0.75, beyond {}max_length_correlation=0.7"),
        (HARMLESS, "length_correlation", -0.8, "length is -0.8, beyond {}max_length_correlation=0.7"),
        (HARMLESS, "auc", None, "harmless: area under the ROC curve is unknown, below {}min_auc=0.75"),
        (HELPFUL, "accuracy", float("nan"), "nan, below {}min_accuracy"),
        (HELPFUL, "length_correlation", float("nan"), "nan, beyond {}max_length_correlation"),
    ],
)
def test_one_line_names_value_bound_key_and_what_forces_it(
    tmp_path: Path, kind: str, name: str, value: float | None, told: str
) -> None:
    write_standing(tmp_path)
    assert judges.check_quality(asking(tmp_path)) == []
    write_standing(tmp_path, **{kind: {name: value}})
    with pytest.raises(CheckpointError) as caught:
        judges.check_quality(asking(tmp_path))
    line = str(caught.value)
    assert told.format("stage.preference.").removeprefix(" ") in line and "\n" not in line
    assert "reward_model-s0-x" in line and line.endswith(FORCE)
    forced = judges.check_quality(asking(tmp_path, force=True))
    assert len(forced) == 1 and told.format("stage.preference.") in forced[0]


def test_on_the_bound_is_good_and_a_margin_draws_it_tighter() -> None:
    on_it = {"accuracy": 0.6, "length_correlation": -0.7}
    assert shortfalls(HELPFUL, on_it, BOUNDS) == []
    assert len(shortfalls(HELPFUL, on_it, BOUNDS, margin=0.01)) == 2
    alike = {"accuracy": 0.6, "length_correlation": None}  # all of one length: nothing to be correlated with
    assert shortfalls(HELPFUL, alike, BOUNDS) == []


def test_a_model_that_nobody_judged_is_refused_and_one_that_weighs_nothing_is_not_looked_at(
    tmp_path: Path,
) -> None:
    write_standing(tmp_path)
    (tmp_path / HARMLESS / judges.QUALITY).unlink()
    with pytest.raises(CheckpointError, match="harmless: it was never measured"):
        judges.check_quality(asking(tmp_path))
    assert judges.check_quality(asking(tmp_path, harmless_weight=0.0)) == []


def test_a_model_that_is_missing_is_refused_even_by_force(tmp_path: Path) -> None:
    """A reward would be dropped without a word: the data had no labels."""
    write_standing(tmp_path)
    shutil.rmtree(tmp_path / HARMLESS)
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"reward_model-s0-x has no harmless model") as caught:
            judges.check_quality(asking(tmp_path, force=force))
        assert "stage.preference.harmless_weight=0" in str(caught.value) and "\n" not in str(caught.value)
    assert judges.check_quality(asking(tmp_path, harmless_weight=0.0)) == []


def test_the_shipped_bounds_refuse_a_coin_and_let_a_judge_pass() -> None:
    stage = compose(["stage=all_scenario"]).config.stage
    assert isinstance(stage, RLConfig) and stage.preference and not stage.preference.force
    for kind, coin in ((HELPFUL, {"accuracy": 0.5}), (HARMLESS, {"auc": 0.5})):
        assert shortfalls(kind, GOOD[kind], stage.preference) == []
        assert shortfalls(kind, GOOD[kind] | coin, stage.preference)


# --- the command line


@pytest.fixture
def weak(house: House) -> House:
    """A house with reward models, of which one orders pairs as a coin would."""
    assert house.call("run", "stage=reward_model", "parent=pretrain") == 0
    checkpoint = house.runs("reward_model")[0] / "checkpoints" / "step-1"
    write_standing(checkpoint, helpful={"accuracy": 0.5})
    checkpoints.write_manifest(checkpoint)
    record = house.runs("reward_model")[0] / "record.json"
    content = json.loads(record.read_text()) | {"checkpoint_hash": checkpoints.manifest_hash(checkpoint)}
    record.write_text(json.dumps(content))
    return house


def test_a_weak_judge_is_refused_before_the_job_starts(weak: House, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    words = ["run", "stage=all_scenario", "parent=pretrain"]
    assert weak.call(*words) == 2
    told = capsys.readouterr().err
    assert "in order is 0.5, below stage.preference.min_accuracy=0.6" in told and told.count("\n") == 1
    assert not weak.runs("all_scenario"), "no run folder is left behind"
    assert weak.call(*words, "stage.preference.min_accuracy=0.5") == 0
    assert weak.call(*words, FORCE) == 0
    assert len(weak.runs("all_scenario")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"accuracy": 0.', "is not valid JSON"), ('{"accuracy": "high"}', "accuracy is wrong")],
)
def test_a_damaged_quality_file_is_one_line(
    weak: House, capsys: pytest.CaptureFixture, content: str, message: str
) -> None:
    checkpoint = weak.runs("reward_model")[0] / "checkpoints" / "step-1"
    (checkpoint / HELPFUL / "quality.json").write_text(content)
    capsys.readouterr()
    assert weak.call("run", "stage=all_scenario", "parent=pretrain") == 2
    err = capsys.readouterr().err
    assert "quality.json" in err and message in err and err.count("\n") == 1


# --- what is shown


def test_the_table_tells_how_the_models_were_judged_and_which_were_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    forced = {"weak_judges": 1, "forced_judges": ["helpful: share of held-out pairs in order is 0.5"]}
    for stage, metrics in (("reward_model", {"reward_models": GOOD}), ("all_scenario", forced)):
        folder = build(tmp_path, stage, seed=3)
        record = json.loads((folder / "record.json").read_text()) | {"metrics": metrics}
        (folder / "record.json").write_text(json.dumps(record))
    compare.show(results.rows(tmp_path))
    shown = capsys.readouterr().out
    assert "reward_model, seed 3, helpful: 80.0% of 300 pairs in order, length r +0.50" in shown
    assert "harmless: area under the curve 0.999 on 300 labels, length r -0.03" in shown
    assert (
        "all_scenario, seed 3, used weak reward models: helpful: share of held-out pairs in order is 0.5"
        in shown
    )


def test_a_run_that_has_just_warned_does_not_say_it_again(capsys: pytest.CaptureFixture) -> None:
    judge = {"name": "m", "weaknesses": ["pointwise: agreement is 0.5"]}
    row = {"stage": "grpo", "seed": 0, "forced_judges": ["helpful: accuracy is 0.5"], "judge": judge}
    assert len([*compare.notes([row])]) == 2
    assert [*compare.notes([compare.without_warnings(row)])] == []
