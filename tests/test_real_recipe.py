"""recipe=real: every stage and control for two steps, on a tiny model in a GGUF file and real rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import write_gguf
from hf_models import write_model

from r1pipe.config.compose import compose
from r1pipe.config.groups import read
from r1pipe.core.errors import DataError
from r1pipe.data import open_data
from r1pipe.launch.pipeline import configs_of
from r1pipe.runs.results import finished_runs

ROWS = 120  # of each file
SHORT = ["stage.max_steps=2", "stage.eval.problems=4", "stage.eval.max_tokens=8", "stage.eval.max_num_seqs=8"]
GROUP = ["stage.group_size=2", "stage.trained_per_group=2"]
RL = ["stage.prompts_per_step=2", *GROUP, "stage.minibatches=1", "stage.sampling.max_tokens=8"]
SAMPLED = ["stage.prompts=4", "stage.samples_per_prompt=2", "stage.sampling.max_tokens=8"]
OVERRIDES = {
    "cold_start": ["stage.demonstrations=8", "stage.sequence_length=512"],
    "control_sft": ["stage.demonstrations=8", "stage.sequence_length=512"],
    "grpo": [*RL, "stage.eval.every=1", "stage.eval.every_problems=2"],
    "rejection_sft": [*SAMPLED, "stage.sequence_length=512"],
    # a random model has no right answer to learn from
    "expert_iteration": [*SAMPLED, "stage.sequence_length=1024", "stage.general_ratio=2"],
    "reward_model": ["stage.pairs=8", "stage.labels=8", "stage.held_out=4", "stage.batch_size=2"],
    "all_scenario": [*RL, "stage.preference.last_steps=1", "stage.preference.force=true"],
}


@pytest.fixture
def words(shared: Path, tmp_path: Path) -> list[str]:
    """The overrides of a run: a tiny model, and the first rows of each file."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("mawps.jsonl", "svamp.jsonl", "gsm8k_train.jsonl"):
        lines = (shared / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (data / name).write_text("".join(lines[:ROWS]), encoding="utf-8")
    for path in (*shared.glob("*_en.json"), *shared.glob("*_zh.json"), shared / "identity.json"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        (data / path.name).write_text(json.dumps(rows[:ROWS]), encoding="utf-8")
    write_model(tmp_path / "model", "qwen2")
    file = write_gguf(tmp_path / "model", tmp_path / "tiny.gguf")
    return ["recipe=real", f"model.path={file}", f"data.path={data}", f"root={tmp_path / 'runs'}"]


def test_the_controls_start_where_reinforcement_does_and_see_no_held_out_row(words: list[str]) -> None:
    configs = {config.stage.name: config for config in configs_of(words)}
    assert list(configs) == [*read("recipe/real")["stages"], *read("recipe/real")["controls"]]
    for name in ("grpo", "control_sft", "expert_iteration"):
        assert configs[name].stage.starts_from == "cold_start"
    data = open_data(configs["grpo"].data, 0)
    held_out = {prompt.question for prompt in data.prompts("test", 10**6, 0)}
    asked = {prompt.question for prompt in data.prompts("train", 10**6, 0)}
    shown = {trace.prompt.question for trace in data.demonstrations(10**6, 0, {}, True)}
    assert held_out and not held_out & (asked | shown) and shown > asked
    with pytest.raises(DataError, match=r"/nowhere"):
        open_data(compose([*words, "stage=grpo", "data.path=/nowhere"]).config.data, 0).prompts("test", 1, 0)


@pytest.mark.slow
def test_every_stage_and_control_runs(words: list[str], tmp_path: Path) -> None:
    recipe = read("recipe/real")
    for stage in (*recipe["stages"], *recipe["controls"]):
        line = [f"stage={stage}", *words, *SHORT, *OVERRIDES.get(stage, [])]
        if stage == "base":
            line.remove("stage.max_steps=2")
        command = [sys.executable, "-m", "r1pipe", "run", *line, "tracking=none", "engine.ranks=1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{stage}: {done.stderr[-2000:]}"
    runs = {run.config["stage"]["name"]: run for run in finished_runs(tmp_path / "runs")}
    assert len(runs) == 8 and runs["grpo"].config["weights_from"]["stage"] == "cold_start"
