"""At temperatures other than 1 sampler, trainer, reference and the KL in the reward mean one distribution.

Elsewhere they did not (trl #4159), or a nucleus was in the sampler's probabilities alone (trl #6945).
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hf_models import write_model
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from rl_runs import rollout_of
from tiny_runs import tiny_config

from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError
from r1pipe.model import Policy, load_pretrained, native
from r1pipe.model.kernels import training as kernels
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.batch import Rollout, collate
from r1pipe.train.rl.update import Reference, completion_logprobs, update
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

PROMPTS = [[1, 5, 6], [1, 9, 9, 4]]
EACH = 4


@pytest.fixture(params=["kernels", "torch", "hf"])
def policy(request, tmp_path, monkeypatch) -> Policy:
    if request.param == "torch":
        monkeypatch.setattr(kernels, "usable", lambda *given, **few: False)
        monkeypatch.setattr(native, "runs_natively", lambda model: False)
    if request.param == "hf":
        return load_pretrained(write_model(tmp_path / "hf", "llama"))
    model = tiny_model()
    with torch.no_grad():  # initial weights make all tokens alike
        model.lm_head.weight.mul_(20)
    return model


def drawn_from(policy: Policy, temperature: float) -> list[Rollout]:
    params = SamplingParams(max_tokens=6, temperature=temperature, n=EACH, seed=1, ignore_eos=True)
    drawn = Batcher(policy, 1, 0).generate(PROMPTS, params)
    return [rollout_of(PROMPTS[i // EACH], c.tokens, c.logprobs, (-1.0) ** i) for i, c in enumerate(drawn)]


def exact(policy: Policy, rollout: Rollout, temperature: float) -> list[float]:
    """log softmax(logits / temperature) of the drawn tokens, row by row, in float64."""
    prompt, tokens = rollout.prompt, rollout.completion.tokens
    with torch.no_grad():
        logits_TV = policy(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].double()
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)
    return logprobs_TV.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_every_log_probability_is_of_the_distribution_that_was_drawn_from(policy, temperature):
    rollouts = drawn_from(policy, temperature)
    expected = [value for rollout in rollouts for value in exact(policy, rollout, temperature)]
    micro = collate(rollouts, None, 0.0, torch.device("cpu"))
    reference = Reference(deepcopy(policy), engine_config())
    with torch.no_grad():
        found = {
            "sampler": micro.old_N,
            "trainer": completion_logprobs(policy, micro, temperature),
            "reference": reference.logprobs([micro], temperature)[0],
        }
        plain_N = completion_logprobs(policy, micro, 1.0)
    for name, found_N in found.items():
        assert found_N.tolist() == pytest.approx(expected, abs=2e-4), name
    assert (plain_N - micro.old_N).abs().mean() > 0.05, "a temperature that is forgotten is seen"


@pytest.mark.parametrize("temperature", [0.6, 1.5])
@pytest.mark.parametrize("correction", ["none", "token_truncate"])
def test_an_update_begins_at_ratio_one_and_without_distance(policy, temperature, correction):
    words = (f"stage.sampling.temperature={temperature}", f"stage.importance={correction}")
    stage = tiny_config("stage=grpo", "stage.minibatches=1", "stage.kl_coef=0.1", *words).stage
    rollouts = drawn_from(policy, temperature)
    reference = Reference(deepcopy(policy), engine_config())
    reference.estimate_kl(rollouts, replace(stage, kl_estimator="k1"))  # for a KL in the reward, PPO's too
    assert max(abs(rollout.kl()) for rollout in rollouts) < 2e-3
    engine = Engine(policy, OPTIM, ROUTER, engine_config(), total_steps=10)
    metrics = update(engine, rollouts, stage, reference)
    ratios = [metrics[f"importance_ratio/{name}"] for name in ("min", "mean", "max")]
    assert ratios == pytest.approx([1.0] * 3, abs=5e-4)
    assert metrics["sampling/sampling_logp_difference/max"] < 5e-4
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6) and metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_what_would_draw_from_a_part_of_the_distribution_is_refused(algorithm):
    def told(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            compose(["stage=grpo", f"stage.algorithm={algorithm}", *words])
        return str(caught.value)

    assert "stage.sampling.top_p=0.95: reinforcement learns" in told("stage.sampling.top_p=0.95")
    assert "it must be above 0" in told("stage.sampling.temperature=0")
    for key in ("top_k", "min_p"):
        assert f"stage.sampling.{key} is no key of the config" in told(f"stage.sampling.{key}=1")
