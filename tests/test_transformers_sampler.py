"""The reference sampler draws what the bundled one draws: transformers' generate, the same random numbers."""

from dataclasses import replace

import pytest
import torch
from hf_models import FAMILIES, write_model
from shapes import SHAPES, V2_SHAPES, ours
from test_rollout import prompts

from r1pipe.core.errors import ConfigError, NumericProblem
from r1pipe.model import load_pretrained
from r1pipe.runs.stopping import Stopped
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.rollout.transformers import TransformersSampler

EOS, PAD = (1, 5), 0
PARAMS = SamplingParams(max_tokens=20, n=2, seed=5, first=1, stride=2, max_num_seqs=4)


def both(model, asked, params, **more):
    """What the two samplers draw."""
    drawn = []
    for sampler in (BundledSampler(EOS, PAD), TransformersSampler(EOS, PAD)):
        sampler.update(WholeWeights(model), 7)
        ended = []
        drawn.append(sampler.generate(asked, params, None, lambda i, c, e=ended: e.append((i, c)), **more))
        assert sorted((i, c.tokens) for i, c in ended) == sorted(
            (number // params.n, c.tokens) for number, c in enumerate(drawn[-1])
        )
    return drawn


def must_be_alike(model, asked, params, **more) -> list:
    one, other = both(model, asked, params, **more)
    assert [c.tokens for c in other] == [c.tokens for c in one]
    assert [(c.finish_reason, c.versions) for c in other] == [(c.finish_reason, c.versions) for c in one]
    for expected, found in zip(one, other, strict=True):
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    return one


def ragged(completions: list) -> bool:
    """Without this a comparison would not mean much."""
    return len({len(completion.tokens) for completion in completions}) > 1


@pytest.mark.parametrize("name", ["v3", "tied", "v2_lite"])
def test_the_bundled_model_draws_the_same_in_transformers(name):
    model = ours((SHAPES | V2_SHAPES)[name])
    assert ragged(must_be_alike(model, prompts(5, model.config), PARAMS))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_transformers_draws_the_same(name, tmp_path):
    model = load_pretrained(write_model(tmp_path / name, name))
    params = replace(PARAMS, stop_token_ids=tuple(range(40, 140)), ignore_eos=True)
    assert ragged(must_be_alike(model, prompts(5, model.config), params))


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}, {"limits": [1, 20, 3, 9, 12]}]
)
def test_temperature_nucleus_and_limits_mean_the_same(changes):
    model = ours(SHAPES["few_experts"])
    limits = changes.pop("limits", None)
    must_be_alike(model, prompts(5, model.config), replace(PARAMS, **changes), limits=limits)


def test_an_update_brings_new_weights_and_a_generation_config_brings_nothing(tmp_path):
    model, sampler = ours(SHAPES["v3"]), TransformersSampler(EOS, PAD)
    asked = prompts(3, model.config)
    sampler.update(WholeWeights(model), 0)
    before = sampler.generate(asked, PARAMS)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert [c.tokens for c in sampler.generate(asked, PARAMS)] == [c.tokens for c in before]
    sampler.update(WholeWeights(model), 1)
    after = sampler.generate(asked, PARAMS)
    assert [c.tokens for c in after] != [c.tokens for c in before]
    assert {c.versions for c in after} == {((len(c.tokens), 1),) for c in after}
    other = load_pretrained(write_model(tmp_path / "qwen2", "qwen2"))
    other.whole.generation_config.update(repetition_penalty=9.0, do_sample=True, top_k=1, eos_token_id=3)
    must_be_alike(other, asked, replace(PARAMS, stop_token_ids=tuple(range(40, 140))))


def test_what_the_model_cannot_do_is_refused_and_a_stop_is_heard():
    model, sampler = ours(SHAPES["v3"]), TransformersSampler(EOS, PAD)
    sampler.update(WholeWeights(model), 0)
    assert sampler.generate([], PARAMS) == []
    with pytest.raises(ConfigError, match="prompt 0 has a token outside the vocabulary"):
        sampler.generate([[97]], PARAMS)
    with pytest.raises(ConfigError, match="stop tokens"):
        sampler.generate([[9]], replace(PARAMS, stop_token_ids=(97,)))
    with pytest.raises(Stopped):
        sampler.generate([[9]], PARAMS, stop=lambda: True)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.fill_(float("nan"))
    sampler.update(WholeWeights(model), 1)
    with pytest.raises(NumericProblem, match="the first layer with such values is"):
        sampler.generate([[9, 8]], PARAMS)
