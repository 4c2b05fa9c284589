"""What corrects for a sampler that is not the trainer: each weight by its definition; which one is taken."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from rl_runs import objective
from tiny_runs import tiny_config

from r1pipe.config.compose import compose
from r1pipe.config.groups import options, read
from r1pipe.config.importance import Importance
from r1pipe.core.errors import ConfigError
from r1pipe.train.rl.losses import importance_weights, policy_loss

FOLDER = "stage/part/importance"


def slow_importance(trainer, sampler, lengths, chosen) -> list[float]:
    """The weights as their definitions read, from each token's probabilities, one after another."""
    weights, first = [], 0
    for length in lengths:
        ratios = [t / s for t, s in zip(trainer[first:][:length], sampler[first:][:length], strict=True)]
        first += length
        for ratio in ratios:
            match chosen.importance.split("_")[0]:
                case "sequence":
                    ratio = math.prod(ratios)
                case "geometric":
                    ratio = math.prod(ratios) ** (1 / length)
            inside = chosen.importance_floor <= ratio <= chosen.importance_cap
            if chosen.importance.endswith("mask"):
                weights.append(ratio if inside else 0.0)
            else:
                weights.append(min(max(ratio, chosen.importance_floor), chosen.importance_cap))
    return weights


@pytest.mark.parametrize("name", [name for name in options(FOLDER) if name != "none"])
def test_each_correction_weighs_tokens_by_its_definition(name):
    generator = torch.Generator().manual_seed(4)
    lengths = [1, 5, 3, 40]
    sampler_N = torch.rand(sum(lengths), generator=generator, dtype=torch.float64).clamp(0.05)
    spread_N = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    trainer_N = (
        sampler_N
        * (spread_N * torch.tensor([0.05, 0.1, 0.9, 0.3]).repeat_interleave(torch.tensor(lengths))).exp()
    )
    chosen = replace(tiny_config("stage=grpo", f"stage.importance={name}").stage, importance_floor=0.95)
    found_N, beyond_N = importance_weights(trainer_N.log() - sampler_N.log(), torch.tensor(lengths), chosen)
    expected = slow_importance(trainer_N.tolist(), sampler_N.tolist(), lengths, chosen)
    assert found_N.tolist() == pytest.approx(expected, rel=1e-9)
    at_bound = (0.0,) if name.endswith("mask") else (chosen.importance_floor, chosen.importance_cap)
    assert beyond_N.tolist() == [weight in at_bound for weight in found_N.tolist()]
    assert 0 < beyond_N.sum() < len(beyond_N), "both kinds of tokens are shown"


def test_a_masked_token_keeps_its_kl():
    chosen = objective(importance="token_mask", importance_cap=2.0, importance_floor=0.5, kl_coef=0.1)
    behind_N = torch.tensor([0.3, 0.1]).log()
    logprobs_N = behind_N.clone().requires_grad_()
    given = (torch.ones(2), torch.ones(2), torch.tensor([2]), chosen)
    result = policy_loss(
        logprobs_N, torch.tensor([0.1, 0.1]).log(), *given, torch.tensor([0.6, 0.1]).log(), behind_N
    )
    result.loss.backward()
    assert logprobs_N.grad.tolist() == pytest.approx([0.1 * (1 - 2), -1.0], rel=1e-5)
    assert result.sums["beyond"] == 1


def test_a_sampler_that_is_not_the_trainer_is_corrected_unless_it_is_said_otherwise():
    def found(*words: str) -> tuple[str, float, float]:
        stage = compose(["stage=grpo", *words]).config.stage
        return stage.importance, stage.importance_cap, stage.importance_floor

    assert found() == ("none", 0, 0)
    assert found("engine.precision=bf16") == ("token_truncate", 2, 0)
    assert found("engine.precision=bf16", "stage.importance=none") == ("none", 0, 0)
    assert found("engine.precision=bf16", "stage.importance_cap=0") == ("none", 0, 0)
    assert found("stage.importance_cap=3") == ("token_truncate", 3, 0)
    assert found("stage.importance=token_mask", "stage.importance_cap=4") == ("token_mask", 4, 0.5)
    smoke = compose(["recipe=smoke", "stage=zero", "stage.importance=sequence_mask"])  # has a cap of its own
    assert (smoke.config.stage.importance, smoke.config.stage.importance_cap) == ("sequence_mask", 3)
    source = compose(["stage=grpo", "engine.precision=bf16"]).sources["stage.importance_cap"]
    assert source == "conf/stage/part/importance/token_truncate.yaml"


def test_every_correction_has_its_file():
    assert set(options(FOLDER)) == set(get_args(Importance))
    for name in options(FOLDER):
        assert read(f"{FOLDER}/{name}")["importance"] == name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "stage.importance=icepop",
            "stage.importance=icepop: no such importance; known: geometric_mask, none",
        ),
        ("stage.importance=none stage.importance_cap=2", "stage.importance=none has no bounds"),
        (
            "stage.importance=token_mask stage.importance_floor=1.5",
            "stage.importance_floor=1.5 would weigh up",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_key_and_remedy(words, told):
    with pytest.raises(ConfigError) as caught:
        compose(["stage=grpo", *words.split()])
    assert told in str(caught.value) and "\n" not in str(caught.value)
