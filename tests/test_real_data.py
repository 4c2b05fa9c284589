"""The four stages on real data (GSM8K, Alpaca, identity rows, preferences), a step or two of a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from tiny_runs import load_stage, tiny_run

from r1pipe.config import ParentRef
from r1pipe.runs import lineage
from r1pipe.train.rl.rows import Row
from r1pipe.train.sft.rejection import GENERAL_ALONE

ROWS = {
    "gsm8k_train.jsonl": 400,
    "gsm8k_test.jsonl": 100,
}  # as many are read here: it is the stages that are tested
WHOLE = ["alpaca_en.json", "alpaca_zh.json", "identity.json", "preference_en.json", "preference_zh.json"]
STEPS = ["stage.max_steps=1", "stage.eval.problems=3", "stage.eval.max_tokens=256"]
RL = ["stage.prompts_per_step=4", "stage.minibatches=1", "stage.sampling.max_tokens=192"]


@pytest.fixture(scope="module")
def some(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in ROWS.items():
        lines = (shared / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    for name in WHOLE:
        shutil.copyfile(shared / name, folder / name)
    return folder


class Walk:
    """Runs stage after stage in this process, each on what the earlier ones made."""

    def __init__(self, root: Path, data: Path):
        self.root, self.data = root, data
        self.made: dict[str, ParentRef] = {}

    def run(self, stage: str, *overrides: str, weights: str = "", reads: str = "") -> Path:
        folder = self.root / stage
        words = [f"stage={stage}", "data=real", f"data.path={self.data}", *STEPS, *overrides]
        parents = {name: self.made[name] for name in [reads] if name}
        tiny_run(folder, *words, weights=self.made.get(weights), **parents)
        load_stage(stage).main(str(folder))
        record = json.loads((folder / "record.json").read_text())
        self.made[stage] = lineage.checkpoint_of_folder(folder / record["checkpoint"])
        return folder


@pytest.fixture(scope="module")
def walked(some: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders by stage."""
    walk = Walk(tmp_path_factory.mktemp("runs"), some)
    walk.run("cold_start", "stage.demonstrations=24", "stage.sequence_length=256")
    walk.run("grpo", *RL, weights="cold_start")
    walk.run(
        "rejection_sft",
        "stage.prompts=6",
        "+stage.general_kinds.writing=2",
        "+stage.general_kinds.identity=1",
        "stage.samples_per_prompt=2",
        reads="grpo",
    )
    walk.run("reward_model", "stage.pairs=8", "stage.held_out=4", weights="rejection_sft")
    no_labels = "stage.preference.harmless_weight=0"
    walk.run("all_scenario", *RL, no_labels, weights="rejection_sft", reads="reward_model")
    return walk.root


def metrics_of(folder: Path) -> Row:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("stage", ["cold_start", "grpo", "rejection_sft", "all_scenario"])
def test_every_stage_trains_and_is_measured_on_gsm8k(walked: Path, stage: str) -> None:
    assert metrics_of(walked / stage)["step"] == 1
    found = json.loads((walked / stage / "evaluation.json").read_text())
    assert found["by_task"]["gsm8k"]["problems"] == found["problems"] == 3
    assert found["too_long"] >= 0 and found["general_score"] is None, "nobody knows what a good answer is"


def test_reinforcement_scores_gsm8k_by_its_final_numbers(walked: Path) -> None:
    rows = pq.read_table(walked / "grpo" / "rollouts" / "step-1.parquet").to_pylist()
    assert {row["task"] for row in rows} == {"gsm8k"} and len(rows) == 16
    assert all(row["score_accuracy"] in (0.0, 1.0) and row["answer"] for row in rows)


def test_where_no_sample_is_right_the_general_part_is_learned_alone(walked: Path) -> None:
    data = walked / "rejection_sft" / "data"
    rows = pq.read_table(data / "samples.parquet").to_pylist()
    assert {row["kind"] for row in rows} == {"general"} and len(rows) == 2  # a third of six prompts
    assert all(row["source"].startswith(("alpaca", "identity")) for row in rows)
    funnel = json.loads((data / "funnel.json").read_text())
    assert funnel[0]["kept"] == 12 and funnel[-1] == {"name": GENERAL_ALONE, "kept": 0, "dropped": 0}
    assert GENERAL_ALONE in (walked / "rejection_sft" / "progress.jsonl").read_text()


def test_preferences_that_fit_are_looked_for_and_no_labels_means_no_such_model(walked: Path) -> None:
    quality = json.loads((walked / "reward_model" / "evaluation.json").read_text())["reward_models"]
    assert list(quality) == ["helpful"] and quality["helpful"]["pairs"] == 4
    checkpoint = walked / "reward_model" / "checkpoints" / "step-1"
    assert (checkpoint / "helpful").is_dir() and not (checkpoint / "harmless").exists()


def test_both_kinds_learn_from_the_preference_files(some: Path, tmp_path: Path) -> None:
    """Pairwise, and point-wise where each answer is read by itself."""
    words = ["stage=reward_model", "data=preferences", f"data.path={some}", "stage.max_steps=0"]
    sizes = ["stage.pairs=16", "stage.labels=16", "stage.batch_size=8", "stage.held_out=8"]
    folder = tiny_run(tmp_path / "run", *words, *sizes)
    load_stage("reward_model").main(str(folder))
    found = json.loads((folder / "record.json").read_text())["metrics"]["reward_models"]
    assert (found["helpful"]["pairs"], found["harmless"]["labels"]) == (8, 8)
    assert 0 <= found["helpful"]["accuracy"] <= 1 and 0 <= found["harmless"]["auc"] <= 1
    losses = [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4, "two steps each"
    weights = [
        load_file(folder / "checkpoints" / "step-4" / kind / "model.safetensors")["score.weight"]
        for kind in ("helpful", "harmless")
    ]
    assert not weights[0].equal(weights[1]) and all(weight.any() for weight in weights)


def test_all_scenario_asks_the_models_that_there_are(walked: Path) -> None:
    rows = pq.read_table(walked / "all_scenario" / "rollouts" / "step-1.parquet").to_pylist()
    general = [row for row in rows if row["task"] != "gsm8k"]
    assert 0 < len(general) < len(rows) and "score_harmless" not in rows[0]
    assert all(row["score_helpful"] is not None and row["reward"] is not None for row in general)


def test_with_nothing_at_all_one_line_says_so(walked: Path, some: Path, tmp_path: Path) -> None:
    made = json.loads((walked / "grpo" / "record.json").read_text())
    parent = lineage.checkpoint_of_folder(walked / "grpo" / made["checkpoint"])
    words = ["stage=rejection_sft", "data=gsm8k", f"data.path={some}", *STEPS]
    folder = tiny_run(tmp_path / "run", *words, "stage.prompts=2", grpo=parent)
    with pytest.raises(SystemExit):
        load_stage("rejection_sft").main(str(folder))
    told = (folder / "error.txt").read_text()
    assert told.startswith("nothing to train on") and "dropped by 'correct'" in told and told.count("\n") == 1


def test_preferences_that_never_fit_are_told(some: Path, tmp_path: Path) -> None:
    words = [
        "stage=reward_model",
        "data=real",
        f"data.path={some}",
        "stage.eval.max_tokens=4",
    ]
    folder = tiny_run(tmp_path / "run", *words, "model.max_position_embeddings=32")
    with pytest.raises(SystemExit):
        load_stage("reward_model").main(str(folder))
    told = (folder / "error.txt").read_text()
    assert "0 preference pairs to train on besides 510 longer than model.max_position_embeddings=32" in told


@pytest.mark.slow
def test_the_smoke_recipe_runs_through_on_real_data(shared: Path, tmp_path: Path) -> None:
    words = ["recipe=smoke", "engine.ranks=2", "data=real", f"data.path={shared}", f"root={tmp_path}"]
    words += ["data.labels=${data.preferences}"]  # there are no safety labels
    command = [sys.executable, "-m", "r1pipe", "reproduce", *words, "tracking=none"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stages = {json.loads(path.read_text())["stage"] for path in tmp_path.glob("*/record.json")}
    assert {"base", "cold_start", "grpo", "rejection_sft", "reward_model", "all_scenario"} <= stages
