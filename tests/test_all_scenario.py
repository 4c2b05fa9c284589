"""R1's last stage on a tiny model: which reward judges what of which prompt, and from which step on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rl_runs import scored_groups
from test_judges import write_standing
from tiny_runs import load_stage, tiny_config, tiny_run

from r1pipe.chat.template import TOKENIZER_FILES, Chat, compose_response
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.model import DeepseekV3
from r1pipe.rewards import BASE_REWARDS
from r1pipe.rewards.models import RewardModel, RewardScorer, save_reward_model
from r1pipe.runs import checkpoints, lineage
from r1pipe.runs.reward_model_quality import FORCE, HARMLESS, HELPFUL, KINDS

SUM = Prompt("s", "word", "en", "What is 2 + 2?", "4")
WISH = Prompt("w", "writing", "en", "Write about a fox.")


def untaught_model() -> RewardModel:
    model = RewardModel(DeepseekV3(tiny_config("stage=all_scenario").model, torch.Generator().manual_seed(0)))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def untaught(tmp_path: Path) -> Path:
    """A reward_model checkpoint whose models know nothing, with a good standing."""
    folder = tmp_path / "reward_model"
    write_standing(folder)
    for kind in KINDS:
        save_reward_model(untaught_model(), folder / kind)
    for name in TOKENIZER_FILES:
        shutil.copyfile(content_dir() / "tokenizer" / name, folder / name)
    checkpoints.write_manifest(folder)
    return folder


def ran(tmp_path: Path, reward_model: Path, *overrides: str) -> Path:
    words = ["stage=all_scenario", "stage.max_steps=3", "stage.preference.last_steps=1", *overrides]
    folder = tiny_run(tmp_path / "run", *words, reward_model=lineage.checkpoint_of_folder(reward_model))
    load_stage("all_scenario").main(str(folder))
    return folder


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a step, without what was not scored."""
    rows = pq.read_table(folder / "rollouts" / f"step-{step}.parquet").to_pylist()
    return [{name: value for name, value in row.items() if value == value} for row in rows]


EVERY = {"score_language", "score_format"}  # every response's
JUDGED = {f"score_{kind}" for kind in KINDS}
UNFORCED = "stage.preference.force=false"  # the smoke recipe forces


def test_preference_rewards_come_with_the_last_steps_and_language_counts_all_along(
    tmp_path: Path, untaught: Path
) -> None:
    folder = ran(tmp_path, untaught, UNFORCED)
    for step in (1, 2):
        rows = rollouts(folder, step)
        assert {row["task"] for row in rows} == {"word"}, "rules alone, on reasoning alone"
        assert all({"score_accuracy", *EVERY} <= row.keys() and not JUDGED & row.keys() for row in rows)
    last = rollouts(folder, 3)
    general = [row for row in last if row["task"] != "word"]
    assert len(general) == len(last) / 2
    for row in last:
        scored = {name for name in row if name.startswith("score_") and row[name] is not None}
        assert scored == {*EVERY, *(["score_accuracy"] if row["task"] == "word" else JUDGED)}
    found = json.loads((folder / "record.json").read_text())["metrics"]
    assert (found["weak_judges"], found["forced_judges"]) == (0, [])


def test_a_job_started_by_hand_refuses_a_weak_judge_too_and_a_forced_one_is_told(
    tmp_path: Path, untaught: Path
) -> None:
    write_standing(untaught, harmless={"auc": 0.6})
    checkpoints.write_manifest(untaught)
    with pytest.raises(SystemExit) as ended:
        ran(tmp_path / "refused", untaught, UNFORCED)
    told = (tmp_path / "refused" / "run" / "error.txt").read_text()
    assert ended.value.code == 2 and "below stage.preference.min_auc=0.75" in told and FORCE in told
    forced = ran(tmp_path / "forced", untaught, FORCE)
    found = json.loads((forced / "record.json").read_text())["metrics"]
    assert found["weak_judges"] == 1 and "area under the ROC curve is 0.6" in found["forced_judges"][0]
    told = (forced / "progress.jsonl").read_text()
    assert told.count(f"reward models are used because of {FORCE}, although harmless: area under") == 1


def test_helpfulness_sees_the_summary_alone_and_harmlessness_all_of_it() -> None:
    chat = Chat.load(content_dir() / "tokenizer")
    texts = [
        compose_response(reasoning, summary)
        for reasoning, summary in (
            ("I plan.", "A fox ran."),
            ("I plan to do harm.", "A fox ran."),
            ("I plan.", "A fox sat."),
        )
    ]
    completions = [Completion([], [], "stop", text) for text in texts]
    earned: dict[str, list[float]] = {}
    for kind in KINDS:
        model = untaught_model()
        with torch.no_grad():
            model.score.bias.fill_(-4.0)  # where the harmlessness reward is not yet whole
            model.score.weight.mul_(0.1)
        earned[kind] = [score.value for score in RewardScorer(model, kind, chat)([WISH] * 3, completions)]
    helpful, harmless = earned[HELPFUL], earned[HARMLESS]
    assert helpful[0] == pytest.approx(helpful[1]) and helpful[0] != pytest.approx(helpful[2])
    assert len({round(value, 7) for value in harmless}) == 3 and all(0 < value < 1 for value in harmless)


def test_language_weighs_in_the_reward_of_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """And accuracy in a reasoning prompt's, the reward models' scores in a general one's."""
    monkeypatch.setitem(
        BASE_REWARDS, "language", lambda prompt, completion: Score(float("狐" not in completion.text))
    )
    answers = [compose_response(reasoning, r"It is \boxed{4}.") for reasoning in ("A fox.", "狐")]
    completions = [Completion([], [], "stop", text) for text in answers]
    models = {kind: lambda prompts, completions: [Score(0.5)] * len(completions) for kind in KINDS}
    weights = {"accuracy": 1.0, "language": 0.1, HELPFUL: 2.0, HARMLESS: 4.0}
    groups = scored_groups([SUM, WISH], completions * 2, weights, models, normalise_std=False)
    assert groups[0].rewards == pytest.approx([1.1, 1.0])
    assert groups[1].rewards == pytest.approx([3.1, 3.0])
