"""The stages on a model of transformers: from its folder to what transformers loads, and resumed."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import write_model
from jobs import write_run
from safetensors.torch import load_file

from r1pipe.chat.template import Chat
from r1pipe.config.compose import compose
from r1pipe.config.script_options import ExportOptions
from r1pipe.core.paths import RunFolder, stages_dir
from r1pipe.launch.parents import with_parents
from r1pipe.runs import results
from r1pipe.runs.files import read_object

COLD = "cold_start-s0-1"
SMALL = [
    "recipe=smoke",
    "tracking=none",
    "engine.ranks=1",
    "engine.threads=1",
    "stage.save_every=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, and a finished cold start."""
    place = tmp_path_factory.mktemp("place")
    write_model(place / "model", "qwen2")
    rows = [
        {"question": f"What is {n} + 2?", "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"} for n in range(40)
    ]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_stage(place, COLD, "cold_start", "sft.py", "engine.zero_level=2")
    return place


def run_stage(place: Path, name: str, stage: str, script: str, *more: str) -> RunFolder:
    words = [*SMALL, f"root={place}", f"model.path={place / 'model'}"]
    if "data=world" not in more:
        words += ["data=gsm8k", f"data.path={place / 'rows.jsonl'}", "stage.eval.general=0"]
    config = compose([f"stage={stage}", "model=hf", *words, *more]).config
    folder = write_run(place / name, with_parents(config))
    runpy.run_path(str(stages_dir() / script))["main"](str(folder))
    return RunFolder(folder)


def resumed(run: RunFolder, script: str) -> RunFolder:
    """The run again, from its first step."""
    folder = run.path.with_name(f"{run.path.name}-again")
    shutil.copytree(run.path, folder)
    again = RunFolder(folder)
    shutil.rmtree(again.checkpoint(2))
    again.record.unlink()
    runpy.run_path(str(stages_dir() / script))["main"](str(folder))
    return again


def same_weights(one: RunFolder, other: RunFolder) -> bool:
    weights, others = (load_file(run.checkpoint(2) / "model.safetensors") for run in (one, other))
    return weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


def test_a_cold_start_leaves_what_transformers_loads(place: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunFolder(place / COLD)
    folder = run.checkpoint(2)
    parent = read_object(run.config)["weights_from"]
    assert Path(parent["checkpoint"]).parent == place / "imported" and run.record.exists()
    tokenizer, chat = AutoTokenizer.from_pretrained(folder), Chat.load(folder)
    messages = [{"role": "user", "content": "What is 3 + 2?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == chat.render(messages, add_generation_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == list(chat.eos_ids)
    trained = load_file(folder / "model.safetensors")
    before = load_file(place / "model" / "model.safetensors")
    assert trained.keys() == before.keys() and not all(
        torch.equal(trained[key], before[key]) for key in trained
    )


def test_a_resumed_cold_start_has_the_same_bits(place: Path) -> None:
    run = RunFolder(place / COLD)
    assert same_weights(run, resumed(run, "sft.py"))


def test_grpo_samples_what_it_trains_and_resumes_with_the_same_bits(place: Path) -> None:
    rows = ["stage.eval.every=0", "stage.reference_every=1", f"parent={place / COLD}"]
    run = run_stage(place, "rl", "grpo", "grpo.py", *rows)
    steps = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [step["sampling/sampling_logp_difference/mean"] < 1e-4 for step in steps] == [True, True]
    assert steps[0]["kl"] < 1e-4 and "router/max_vio" not in steps[0]
    assert same_weights(run, resumed(run, "grpo.py"))


@pytest.mark.slow
def test_every_stage_of_the_smoke_recipe(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "qwen3_moe")
    words = ["recipe=smoke", "model=hf", f"model.path={tmp_path / 'model'}", "stage.router.balance_alpha=0"]
    line = [sys.executable, "-m", "r1pipe", "reproduce", *words, f"root={tmp_path / 'runs'}", "tracking=none"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stages = {run.stage for run in results.finished_runs(tmp_path / "runs")}
    recipe = compose(["recipe=smoke"]).config.recipe
    assert stages == {*recipe.stages, *recipe.controls} - {"pretrain"}


ADAPTERS = ["model.lora.rank=4", "model.lora.targets=[q_proj,v_proj,down_proj]", "stage.optim.lr=0.02"]


def test_adapters_go_through_the_stages_and_leave_whole_weights(place: Path, tmp_path: Path) -> None:
    cold = run_stage(place, "lora-cold", "cold_start", "sft.py", "engine.zero_level=3", *ADAPTERS)
    more = ["stage.eval.every=0", "stage.reference_every=1", "stage.minibatches=1", *ADAPTERS]
    run = run_stage(place, "lora-rl", "grpo", "grpo.py", f"parent={cold.path}", *more)
    before, between, after = (
        load_file(folder / "model.safetensors")
        for folder in (place / "model", cold.checkpoint(2), run.checkpoint(2))
    )
    assert before.keys() == between.keys() == after.keys(), "merged"
    for name in before:
        is_target = name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight"))
        assert torch.equal(before[name], between[name]) == (not is_target), name
        assert torch.equal(between[name], after[name]) == (not is_target), name
    steps = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [step["sampling/sampling_logp_difference/mean"] < 1e-4 for step in steps] == [True, True]
    assert [step["kl"] < 1e-4 for step in steps] == [True, True], "the reference follows after each step"
    assert same_weights(run, resumed(run, "grpo.py"))
    options = ExportOptions(run.checkpoint(2), tmp_path / "out", None, 5.0)
    runpy.run_path(str(stages_dir() / "export.py"))["main"](options)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_the_reference_of_adapters_is_their_base(place: Path) -> None:
    """A copy of the model as reference, and the model without its adapters, give the same KL."""
    more = ["stage.eval.every=0", "stage.reference_every=0", "stage.minibatches=1", *ADAPTERS]
    run = run_stage(place, "lora-kl", "grpo", "grpo.py", f"parent={place / COLD}", *more)
    steps = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert steps[0]["kl"] < 1e-6 < steps[1]["kl"]


def critic_of(run: RunFolder) -> dict[str, torch.Tensor]:
    state = run.checkpoint(2) / "engine" / "critic" / "state" / "mp_rank_00_model_states.pt"
    return torch.load(state, weights_only=False)["module"]


@pytest.mark.parametrize("level", [0, 2])
def test_ppo_trains_adapters_of_policy_and_value_model(place: Path, level: int) -> None:
    more = ["stage.algorithm=ppo", "stage.eval.every=0", "stage.minibatches=1", f"engine.zero_level={level}"]
    more += ["stage.kl_coef=0.1", "stage.reference_every=1", f"parent={place / COLD}", *ADAPTERS]
    run = run_stage(place, f"lora-ppo-{level}", "grpo", "grpo.py", *more)
    steps = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert steps[0]["value/mean"] == 0.0 != steps[1]["value/mean"]
    assert [step["kl"] < 1e-4 for step in steps] == [True, True], "the reference follows after each step"
    again = resumed(run, "grpo.py")
    assert same_weights(run, again)
    values, others = critic_of(run), critic_of(again)
    assert values.keys() == others.keys() and all(torch.equal(values[key], others[key]) for key in values)
    assert all("lora_" in name or "score" in name for name in values), "the trunk is the parent's"
    assert any(values[name].any() for name in values if "lora_B" in name), "it learns"
    assert (
        load_file(run.checkpoint(2) / "model.safetensors").keys()
        == load_file(place / "model" / "model.safetensors").keys()
    ), "merged"


def test_a_student_learns_through_adapters(place: Path) -> None:
    """Rejection sampling and distillation: the student is the folder, its teacher the reinforced model."""
    words = ["data=world", "stage.eval.problems=2", *ADAPTERS]
    run_stage(
        place, "rejection_sft-s0-1", "rejection_sft", "rejection_sft.py", "stage.reads=[cold_start]", *words
    )
    run = run_stage(place, "lora-distill", "distill", "distill.py", *words)
    parents = read_object(run.record)["parents"]
    assert [data["run_id"] for data in parents["data"]] == ["rejection_sft-s0-1"]
    before, after = (
        load_file(folder / "model.safetensors") for folder in (place / "model", run.checkpoint(2))
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all("_proj" in name for name in changed)
    assert (run.checkpoint(2) / "adapter" / "adapter_config.json").is_file()
    assert same_weights(run, resumed(run, "distill.py"))
