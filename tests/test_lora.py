"""Adapters (model.lora): PEFT's own numbers, trained alone, resumed, merged, and left out as reference."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import write_model
from jobs import OPTIM, engine_config
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from r1pipe.config import LoRAConfig
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.model import load_pretrained, save_pretrained
from r1pipe.model.hf import HFModel, lora
from r1pipe.model.policy import named_weights
from r1pipe.rewards.models import RewardModel, load_reward_model, save_reward_model, score_rows
from r1pipe.runs.files import read_object
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.writing import Writer
from r1pipe.train.rl.base_reference import BaseReference
from r1pipe.train.rl.batch import Rollout, collate
from r1pipe.train.rl.critic import ValueModel
from r1pipe.train.rl.update import Reference, completion_logprobs
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

PROMPTS = [[5, 9, 300], [7, 7, 8, 9, 12, 400, 21], [3]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in ("qwen2", "qwen3_moe")}


def adapted(folder: Path, targets: list[str] | None = None, seed: int = 1, moved: bool = True) -> HFModel:
    """The model of a folder with adapters; `moved`: as if they had been trained."""
    model = load_pretrained(folder)
    assert isinstance(model, HFModel)
    lora.add(model, LoRAConfig(4, None, targets, 1), seed)
    if moved:
        draw = torch.Generator().manual_seed(seed)
        for weight in lora.weights(model).values():
            weight.data.normal_(std=0.2, generator=draw)
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 1100, shape, generator=torch.Generator().manual_seed(4))


# --- the model


@torch.no_grad()
def test_adapters_begin_without_effect_and_from_their_seed_alone(folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    model, again, other = (adapted(folders["qwen2"], seed=seed, moved=False) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state()), "no draw from the global stream"
    assert torch.equal(model(tokens(2, 9)), load_pretrained(folders["qwen2"]).eval()(tokens(2, 9)))
    first, same, another = (lora.weights(one) for one in (model, again, other))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], another[name]) for name in first)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(first) == 2 * 2 * 7 and all("lora_" in name for name in trained)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
@torch.no_grad()
def test_what_is_saved_is_read_by_transformers_and_peft(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(folders[name])
    logits = model(tokens(2, 9))
    save_pretrained(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / lora.FOLDER).eval()
    assert torch.equal(theirs(tokens(2, 9)).logits, logits)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.allclose(base(tokens(2, 9)).logits, logits, atol=0.1), "they do something"
    assert torch.allclose(merged(tokens(2, 9)).logits, logits, atol=1e-4)
    by_peft = theirs.merge_and_unload()
    for own, other in zip(merged.parameters(), by_peft.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-6)
    again = load_pretrained(tmp_path)
    assert isinstance(again, HFModel) and again.adapter is None
    held, read = named_weights(model), load_file(tmp_path / "model.safetensors")
    assert held.keys() == read.keys() and all(torch.equal(held[key], read[key]) for key in read)
    assert sorted(read_object(tmp_path / lora.FOLDER / lora.SETTINGS)["target_modules"])[0].endswith("_proj")


def test_only_the_targets_get_adapters(folders: dict[str, Path]) -> None:
    names = lora.adapted(adapted(folders["qwen2"], ["q_proj", "1.mlp.up_proj"]).whole)
    assert set(names) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    for target in ("lm_head", "embed_tokens", "roj"):
        with pytest.raises(ConfigError, match=f"{target} is no linear layer of Qwen2ForCausalLM"):
            adapted(folders["qwen2"], [target])


def rollouts_from(model: HFModel) -> list[Rollout]:
    params = SamplingParams(max_tokens=9, n=4, seed=3)
    drawn = Batcher(model, (11, 600, 601), 0, max_num_seqs=5).generate(PROMPTS, params, limits=[9, 5, 9])
    return [Rollout(PROMPTS[i // 4], completion, 1.0, True) for i, completion in enumerate(drawn)]


def test_the_sampler_draws_from_what_is_trained(folders: dict[str, Path]) -> None:
    model = adapted(folders["qwen2"])
    micro = collate(rollouts_from(model), None, 0.0, CPU)
    trained = completion_logprobs(model.train(), micro, 1.0)
    assert (trained - micro.old_N).abs().max() < 1e-4
    model.model.set_recompute(True)
    recomputed = completion_logprobs(model, micro, 1.0)
    assert (recomputed - trained).abs().max() < 1e-4
    recomputed.sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in lora.weights(model).values())


def test_reward_and_value_models_have_adapters_too(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(folders["qwen2"])
    critic = ValueModel(copy.deepcopy(model))
    micro = collate(rollouts_from(model), None, 0.0, CPU)
    (critic(micro) - 1).square().sum().backward()
    assert {name for name, p in critic.named_parameters() if p.grad is not None} == {
        *(name for name, _ in critic.named_parameters() if "lora_" in name),
        "score.weight",
        "score.bias",
    }
    judge = RewardModel(model)
    torch.nn.init.normal_(judge.score.weight, generator=torch.Generator().manual_seed(1))
    save_reward_model(judge, tmp_path)
    scores = score_rows(judge, PROMPTS, 0)
    assert len(set(scores)) == 3 and score_rows(load_reward_model(tmp_path), PROMPTS, 0) == pytest.approx(
        scores, rel=1e-4
    )


# --- under the engine


def engine_of(folder: Path, level: int = 0, precision: str = "fp32", adapters: bool = True) -> Engine:
    model = adapted(folder, moved=False) if adapters else load_pretrained(folder)
    config = replace(engine_config(1, level, precision), recompute=level == 3)
    return Engine(model, OPTIM, None, config, total_steps=10)


def trained(engine: Engine, steps: int) -> list[float]:
    rows = tokens(4, 10)

    def loss() -> torch.Tensor:
        return cross_entropy(engine.module(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())

    return [engine.train_step([loss]).loss for _ in range(steps)]


LEVELS = [(0, "fp32"), (2, "bf16"), (3, "fp32")]


@pytest.mark.parametrize(("level", "precision"), LEVELS)
def test_resume_is_exact(folders: dict[str, Path], tmp_path: Path, level: int, precision: str) -> None:
    engine = engine_of(folders["qwen2"], level, precision)
    first = trained(engine, 1)
    engine.save(tmp_path / "engine", {"step": 1})
    expected = trained(engine, 2)
    assert expected[1] < first[0], "it learns"
    again = engine_of(folders["qwen2"], level, precision)
    assert again.load(tmp_path / "engine") == {"step": 1}
    assert trained(again, 2) == expected
    with engine.gathered() as model:
        base = load_pretrained(folders["qwen2"]).state_dict()
        for name, tensor in model.state_dict().items():
            if "lora_" not in name:
                kept = base[name.replace(".base_layer", "")]
                assert torch.equal(tensor, kept.to(tensor.dtype)), f"{name} is frozen"
    size = sum(path.stat().st_size for path in (tmp_path / "engine").rglob("*.pt"))
    assert size < 4 * sum(tensor.numel() for tensor in base.values()), "the base is not saved again"


def test_a_state_is_read_at_another_zero_level(folders: dict[str, Path], tmp_path: Path) -> None:
    for old, new in ((0, 3), (3, 2), (2, 0)):
        engine = engine_of(folders["qwen2"], old)
        trained(engine, 2)
        engine.save(tmp_path / f"{old}", {"step": 2})
        again = engine_of(folders["qwen2"], new)
        assert again.load(tmp_path / f"{old}") == {"step": 2}
        assert trained(again, 2) == pytest.approx(trained(engine, 2), rel=1e-4)


@pytest.mark.parametrize("level", [0, 3])
def test_a_sampler_elsewhere_is_sent_merged_weights(
    folders: dict[str, Path], tmp_path: Path, level: int
) -> None:
    engine = engine_of(folders["qwen2"], level)
    trained(engine, 2)
    with engine.gathered() as model:
        save_pretrained(model, tmp_path)
    sent = {name: tensor.clone() for bucket in engine.buckets(5000) for name, tensor in bucket.items()}
    saved = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == saved.keys() and all(torch.equal(sent[name], saved[name]) for name in saved)


def test_a_state_of_other_adapters_is_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    engine = engine_of(folders["qwen2"], 0, adapters=False)
    trained(engine, 1)
    engine.save(tmp_path, {})
    with pytest.raises(CheckpointError, match="has other weights than the model"):
        engine_of(folders["qwen2"], 0).load(tmp_path)


@pytest.mark.parametrize("level", [0, 2, 3])
def test_the_reference_is_the_base_and_leaves_training_as_it_is(
    folders: dict[str, Path], tmp_path: Path, level: int
) -> None:
    base = load_pretrained(folders["qwen2"])
    assert isinstance(base, HFModel)
    micro = collate(rollouts_from(base.eval()), None, 0.0, CPU)
    copied = Reference(base, engine_config())
    (of_base,) = copied.logprobs([micro], 0.7)
    engine, alone = (engine_of(folders["qwen2"], level) for _ in range(2))
    reference = BaseReference(engine)
    assert torch.equal(reference.logprobs([micro], 0.7)[0], of_base)
    assert trained(engine, 3) == trained(alone, 3)
    assert torch.equal(reference.logprobs([micro], 0.7)[0], of_base), "still the base"
    reference.replace_by(engine)
    with engine.gathered() as policy, torch.no_grad():
        now = completion_logprobs(policy, micro, 0.7)
    trained(alone, 2)
    trained(engine, 2)
    reference.save(tmp_path, {}, Writer(tmp_path))
    other = BaseReference(engine)
    other.load(tmp_path)
    saved, read = (one.logprobs([micro], 0.7)[0] for one in (reference, other))
    assert torch.equal(saved, read)
    # weights that lie elsewhere in memory give other last bits on some processors
    assert torch.allclose(saved, now, rtol=0, atol=1e-5), "the policy of that time"
    assert not torch.allclose(saved, of_base, rtol=0, atol=1e-5)
    assert trained(engine, 2) == trained(alone, 2)
