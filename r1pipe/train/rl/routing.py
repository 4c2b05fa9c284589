"""Sampler and trainer beside each other in their choices of experts.

Axes: B rows, T columns; L MoE layers, K experts of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from r1pipe.config import ModelConfig, RLConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Completion
from r1pipe.model import DeepseekV3
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.batch import MicroBatch, Rollout, collate
from r1pipe.train.rl.update import balances_of, completion_logprobs


def records(config: RLConfig) -> bool:
    """Whether the sampler should record the experts of the tokens that it draws."""
    return config.replay_routing or config.routing_check_samples > 0


def check_recorded(completions: Sequence[Completion], model: ModelConfig) -> None:
    """Raises EnvironmentProblem where there is nothing to replay, or it is not of this model's routers."""
    layers = model.num_hidden_layers - model.first_k_dense_replace
    for completion in completions:
        chosen = completion.experts
        if chosen is None:
            raise EnvironmentProblem(
                "stage.replay_routing=true: the sampler returned completions without their experts; give "
                "engine.sampler=bundled, a vLLM server with --enable-return-routed-experts, or "
                "stage.replay_routing=false"
            )
        wanted = len(completion.tokens), layers, model.num_experts_per_tok
        if chosen.shape != wanted or chosen.min() < 0 or chosen.max() >= model.n_routed_experts:
            raise EnvironmentProblem(
                f"stage.replay_routing=true: the sampler returned experts of shape {chosen.shape}, up to "
                f"number {chosen.max(initial=0)}; this model needs {wanted} (tokens, MoE layers, experts "
                f"of a token) below {model.n_routed_experts}; give stage.replay_routing=false"
            )


@torch.no_grad()
def routing_agreement(
    engine: Engine, rollouts: Sequence[Rollout], config: RLConfig, count: int
) -> dict[str, float]:
    """`train/routing_agreement`: the share of the sampler's choices of experts that the trainer makes too.

    Over each rank's `count` shortest rollouts whose experts are recorded; the trainer chooses by itself here,
    whatever is replayed. Empty where no expert was recorded.
    """
    rows = [rollout for rollout in rollouts if rollout.completion.experts is not None]
    rows = sorted(rows, key=lambda rollout: len(rollout.completion.tokens))[:count]
    same_N = torch.zeros(0)
    with engine.gathered() as policy:
        if rows and isinstance(policy, DeepseekV3):
            same_N = _same(policy, collate(rows, None, 0.0, engine.device), config.sampling.temperature)
    same, chosen = engine.sum_over_ranks([float(same_N.sum()), float(same_N.numel())])
    return {"train/routing_agreement": same / chosen} if chosen else {}


def _same(policy: DeepseekV3, micro: MicroBatch, temperature: float) -> Tensor:
    """Whether each recorded choice of the rows' tokens is also the policy's, flattened."""
    assert micro.experts_LNK is not None
    balances = balances_of(micro, with_loss=False)
    completion_logprobs(policy, micro, temperature, balances)
    trained_LNK = torch.stack(balances[1].experts)
    same_LNK = (micro.experts_LNK.unsqueeze(-1) == trained_LNK.unsqueeze(-2)).any(dim=-1)
    return same_LNK[:, micro.sources_N].flatten()
