"""A sampler in another precision than the trainer's: a copy that follows the weights."""

from dataclasses import replace

import pytest
import torch
from jobs import engine_config
from rl_runs import go, metrics_of
from shapes import ours, tiny, tokens
from tiny_runs import tiny_run

from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError
from r1pipe.core.types import Completion
from r1pipe.model import DeepseekV3
from r1pipe.model.kernels import reference
from r1pipe.model.kernels.fp8 import FP8
from r1pipe.model.training import compute_in
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.rollout.bundled import BundledSampler, Copy

SHAPE = tiny(moe_intermediate_size=32, q_lora_rank=32)  # widths that FP8 takes
PARAMS = SamplingParams(max_tokens=12, n=2, seed=3, ignore_eos=True)
GAP = "sampling/sampling_logp_difference/mean"


def drawn(completions: list[Completion]) -> list[tuple[list[int], list[float]]]:
    return [(completion.tokens, completion.logprobs) for completion in completions]


def expected(model: DeepseekV3, precision: str) -> list[tuple[list[int], list[float]]]:
    rounded = ours(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded = rounded.bfloat16().eval()
    if precision == "fp8":
        compute_in(rounded, FP8(reference, False))
    return drawn(Batcher(rounded).generate(tokens(3, 9, SHAPE).tolist(), PARAMS))


@pytest.mark.parametrize(
    "shape", [SHAPE, replace(SHAPE, tie_word_embeddings=True, num_nextn_predict_layers=1)]
)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_copy_draws_as_a_model_of_that_precision_and_follows_the_weights(precision, shape):
    policy = ours(shape)
    sampler = BundledSampler((), 0, copy=Copy(replace(engine_config(), sampler_precision=precision)))
    sampler.update(WholeWeights(policy), 0)
    first = drawn(sampler.generate(tokens(3, 9, SHAPE).tolist(), PARAMS))
    assert first == expected(policy, precision)
    with torch.no_grad():
        policy.lm_head.weight.mul_(-1)
        policy.model.layers[1].mlp.gate.e_score_correction_bias.add_(torch.arange(16.0))
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    sampler.update(WholeWeights(policy), 1)
    second = drawn(sampler.generate(tokens(3, 9, SHAPE).tolist(), PARAMS))
    assert second == expected(policy, precision) != first
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())


def test_a_copy_of_sharded_weights_is_let_go_of_after_each_drawing():
    policy, config = ours(SHAPE), replace(engine_config(1, 3), sampler_precision="bf16")
    sampler = BundledSampler((), 0, copy=Copy(config))
    sampler.update(WholeWeights(policy), 0)
    for _ in range(2):
        assert drawn(sampler.generate(tokens(3, 9, SHAPE).tolist(), PARAMS)) == expected(policy, "bf16")
        assert sampler.copy is not None and sampler.copy.model is None


def test_a_run_shows_the_gap(tmp_path):
    words = ["stage=grpo", "stage.max_steps=1", "stage.sampling.max_tokens=8", "stage.kl_coef=0"]
    gaps = []
    for precision in ("same", "bf16"):
        folder = tiny_run(tmp_path / precision, *words, f"engine.sampler_precision={precision}")
        go(folder)
        gaps += [row[GAP] for row in metrics_of(folder)]
    assert gaps[0] < 1e-5 and gaps[1] > 10 * gaps[0]


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "engine.sampler_precision=fp8 model.moe_intermediate_size=24",
            "24 is no multiple of 16, as engine.sampler_precision",
        ),
        ("engine.sampler_precision=int8", "engine.sampler_precision"),
    ],
)
def test_what_it_does_not_go_with(words, said):
    with pytest.raises(ConfigError, match=said):
        compose(["stage=grpo", "recipe=laptop", *words.split()])
