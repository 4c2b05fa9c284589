"""What a run's models take, by the estimate and in truth; the disk that is asked for before a job."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import House
from hf_models import write_model
from rl_runs import go
from tiny_runs import load_stage, tiny_config, tiny_run

from r1pipe.config import RunConfig, StageConfig, read_config
from r1pipe.config.compose import compose
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.doctor import resources
from r1pipe.launch import command as launch
from r1pipe.model import logprobs
from r1pipe.plan import footprint, sizes

# wide enough that what is not weights (the tokenizer, names) is little
WIDE = ("model.hidden_size=128", "model.intermediate_size=256", "model.moe_intermediate_size=64")
GRPO = (
    *("stage=grpo", "stage.sampling.max_tokens=8", "stage.max_steps=1", "stage.save_every=0"),
    *WIDE,
)
REPLACED, KEPT = "stage.reference_every=1", "stage.reference_every=0"
PPO = "stage.algorithm=ppo"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "words",
    [
        f"{KEPT} engine.zero_level=0",
        f"{REPLACED} engine.zero_level=1",
        pytest.param(f"{PPO} {KEPT} engine.zero_level=1 engine.precision=bf16", marks=pytest.mark.slow),
        pytest.param(f"{PPO} {REPLACED} engine.zero_level=0", marks=pytest.mark.slow),
        pytest.param(
            f"{PPO} {REPLACED} engine.zero_level=3 engine.precision=bf16 engine.moments=bf16",
            marks=pytest.mark.slow,
        ),
        f"{PPO} {REPLACED} engine.zero_level=3 model.num_nextn_predict_layers=1",
    ],
)
def test_a_checkpoint_is_as_large_as_estimated(words: str, tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", *GRPO, *words.split())
    go(folder)
    estimate = footprint.checkpoint_bytes(read_config(folder / "config.json"))
    assert size_of(folder / "checkpoints" / "step-1") == pytest.approx(estimate, rel=0.03)


@pytest.mark.parametrize("stage", ["cold_start", "reward_model"])
def test_so_is_one_of_a_stage_without_a_policy_that_samples(stage: str, tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", f"stage={stage}", *WIDE)
    load_stage(stage).main(str(folder))
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    estimate = footprint.checkpoint_bytes(read_config(folder / "config.json"))
    assert size_of(newest) == pytest.approx(estimate, rel=0.03)


def test_the_estimate_knows_how_many_logits_a_pass_holds() -> None:
    assert sizes.LOGITS_IN_MEMORY == logprobs.LOGITS_IN_MEMORY


def states(*words: str) -> float:
    return footprint.states(compose(["stage=grpo", "recipe=gpu", *words]).config)


def test_ppo_takes_a_second_engine_in_memory_and_on_disk() -> None:
    config = compose(["stage=grpo", "recipe=gpu"]).config
    value = footprint.trunk(config.model)
    head = config.model.vocab_size * config.model.hidden_size
    assert value == footprint.parameters(config.model) - head
    # bfloat16 weights, float32 gradients, masters and moments; on disk all but the gradients
    assert states(PPO) - states() == (2 + 4 + 4 + 8) * value
    for reference in (KEPT, REPLACED):
        both = [compose(["stage=grpo", "recipe=gpu", reference, *word]).config for word in ([], [PPO])]
        plain, ppo = map(footprint.checkpoint_bytes, both)
        assert ppo - plain == (2 + 4 + 8) * value


@pytest.mark.parametrize("word", ["stage.algorithm=grpo", PPO])
def test_a_reference_is_saved_once_it_is_replaced_within_the_stage(word: str) -> None:
    def size(*words: str) -> int:
        return footprint.checkpoint_bytes(compose(["stage=grpo", "recipe=gpu", word, *words]).config)

    body = footprint.without_mtp(compose(["stage=grpo", "recipe=gpu"]).config.model)
    assert size(REPLACED) - size(KEPT) == 2 * body
    assert size("stage.reference_every=201") == size(REPLACED, "stage.kl_coef=0") == size(KEPT)


def test_completions_that_wait_for_their_step_take_room_in_a_checkpoint() -> None:
    words = ("stage=grpo", "recipe=gpu", "stage.prompts_per_step=8", "stage.group_size=4")
    now, ahead = (
        footprint.checkpoint_bytes(
            compose([*words, "stage.sampling.max_tokens=100", f"engine.async_steps={k}"]).config
        )
        for k in (0, 2)
    )
    assert ahead - now == 2 * 8 * 4 * 100 * (4 + 8), "a token's id, and its log-probability"


def test_the_reward_models_of_the_last_stage_stay_in_memory() -> None:
    last = compose(["stage=all_scenario", "recipe=gpu"]).config
    rules = replace(last, stage=replace(last.stage, preference=None))
    assert footprint.states(last) - footprint.states(rules) == 2 * 2 * footprint.trunk(last.model)


def test_what_would_make_the_largest_part_smaller_is_the_remedy() -> None:
    plain, ppo, tuned = (
        compose(words).config.stage for words in (["stage=grpo"], ["stage=grpo", PPO], ["stage=cold_start"])
    )

    def remedy(stage: StageConfig, *parts: float) -> str:
        return resources.less_of(footprint.Need(*parts), stage)

    assert "engine.zero_level=3" in remedy(plain, 9, 1, 1, 1)
    assert "stage.algorithm=grpo" in remedy(ppo, 9, 1, 1, 1) and PPO not in remedy(plain, 9, 1, 1, 1)
    assert "stage.max_tokens_per_micro_batch" in remedy(plain, 1, 9, 1, 1)
    assert "engine.gradient_accumulation" in remedy(tuned, 1, 9, 1, 0)
    assert "stage.sampling.max_num_seqs" in remedy(plain, 1, 1, 1, 9)


def test_zero_keeps_masters_of_float32_weights_too() -> None:
    plain, zero = (tiny_config("stage=cold_start", f"engine.zero_level={level}") for level in (0, 1))
    assert footprint.states(zero) - footprint.states(plain) == 4 * footprint.parameters(plain.model)


def test_ranks_that_share_out_experts_hold_fewer_of_them() -> None:
    words = ("stage=cold_start", "engine.ranks=2", "model.num_nextn_predict_layers=1")
    for level, bytes_of_a_weight in ((1, 4 + 4), (2, 4), (3, 0)):  # weights and gradients, weights, nothing
        whole, shared = (
            tiny_config(*words, f"engine.zero_level={level}", f"engine.expert_parallel={n}") for n in (1, 2)
        )
        less = footprint.states(whole) - footprint.states(shared)
        assert less == bytes_of_a_weight * sizes.routed(whole.model) / 2
        assert footprint.checkpoint_bytes(whole) == footprint.checkpoint_bytes(shared)


# --- adapters

GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "1000000"
}  # glibc gives back what is freed, so that what is held counts
MIDDLE = {  # 33M weights
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["cold_start", "grpo"])
def test_adapters_take_the_memory_of_their_share(stage: str, tmp_path: Path) -> None:
    """In reinforcement with a KL reference, which is a second copy of the model where there are none."""
    write_model(tmp_path / "small", "llama", max_position_embeddings=256)
    write_model(tmp_path / "model", "llama", max_position_embeddings=256, **MIDDLE)
    script, told = Path(__file__).with_name("adapters_memory.py"), {}
    for words in ((), ("model.lora.rank=16",)):
        line = [sys.executable, str(script), str(tmp_path), stage, *words]
        paths = f"{script.parent.parent}:{script.parent}"
        environment = {**os.environ, **GIVES_BACK, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        told[words] = json.loads(done.stdout.splitlines()[-1])
    plain, adapted = (found["found"]["update"] for found in told.values())
    estimates = [found["estimate"] for found in told.values()]
    assert adapted == pytest.approx(estimates[1], rel=0.15), told  # 407 and 434 MiB of the same run
    assert 0.8 < plain / estimates[0] < 1.1, told
    weights = 33.4e6 * 4 / footprint.MEBIBYTE
    copies = 3 if stage == "grpo" else 2  # moments and the reference; gradients come at another time
    assert plain - adapted > 0.75 * copies * weights, told


# --- room


def free(monkeypatch: pytest.MonkeyPatch, checkpoints: float, config: RunConfig) -> None:
    """A disk with room for so many checkpoints, and what is small."""
    left = int(checkpoints * footprint.checkpoint_bytes(config)) + footprint.SPARE
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda path: usage(left, 0, left))


def test_a_run_that_goes_on_needs_room_for_what_it_has_not_written_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("stage=grpo", "stage.keep=3", f"root={tmp_path}")
    run = RunFolder(tmp_path / "run")
    free(monkeypatch, 2.5, config)
    with pytest.raises(EnvironmentProblem, match=r"checkpoints need up to .* \(4 of .* MiB\); free some"):
        footprint.check_disk_space(config, run)
    for step in (1, 2):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "manifest.json").touch()
    footprint.check_disk_space(config, run)
    free(monkeypatch, 1.5, config)
    with pytest.raises(EnvironmentProblem, match=r"\(2 of "):
        footprint.check_disk_space(config, run)
    for step in (3, 4, 5):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "manifest.json").touch()
    footprint.check_disk_space(config, run)
    free(monkeypatch, 0.5, config)
    with pytest.raises(EnvironmentProblem, match=r"\(1 of "):
        footprint.check_disk_space(config, run)  # a new one is written before the oldest goes


def test_the_command_counts_what_is_there(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "wait")
    words = ("stage=pretrain", "stage.keep=2", f"root={house.root}", "tracking=none")
    config = compose(list(words)).config
    run = RunFolder(house.root / "pretrain-s0")
    run.checkpoint(1).mkdir(parents=True)
    (run.checkpoint(1) / "manifest.json").touch()
    free(monkeypatch, 2.5, config)
    launch.checked_command(config, run)
    with pytest.raises(EnvironmentProblem, match=r"\(3 of "):
        launch.checked_command(config, RunFolder(house.root / "another"))
