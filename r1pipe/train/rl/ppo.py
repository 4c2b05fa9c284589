"""PPO's advantages and value loss as pure functions (Schulman et al., arXiv 1506.02438 and 1707.06347).

Axes: T tokens of one completion, N completion tokens of a micro-batch.
"""

import torch
from torch import Tensor


def token_rewards(score: float, kl_T: Tensor | None, kl_coef: float, length: int) -> Tensor:
    """rewards_T: each token's KL taken off, and what the whole completion earned, at its last token.

    DeepSeekMath (arXiv 2402.03300), eq. 2, with rules in the reward model's place.
    """
    rewards_T = torch.zeros(length) if kl_T is None else -kl_coef * kl_T
    rewards_T[-1] += score
    return rewards_T


def gae(rewards_T: Tensor, values_T: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """advantages_T: A_t = d_t + gamma lambda A_(t+1) with d_t = r_t + gamma V_(t+1) - V_t.

    Generalised advantage estimation (arXiv 1506.02438, eq. 16).
    Nothing comes after the last token, so its next value is 0, where the answer was cut off too: what that
    costs is in the reward.
    """
    next_T = torch.cat([values_T[1:], values_T.new_zeros(1)])
    deltas = (rewards_T + gamma * next_T - values_T).tolist()
    advantages, later = [0.0] * len(deltas), 0.0
    for t in reversed(range(len(deltas))):
        later = deltas[t] + gamma * gae_lambda * later
        advantages[t] = later
    return torch.tensor(advantages)


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float | None) -> Tensor:
    """(V - R)^2 / 2 per token; with `clip` the greater of it and of V's when held at old +- clip.

    The clip is that of PPO's first implementation (Engstrom et al., arXiv 2005.12729, eq. 2).
    """
    loss_N = (values_N - returns_N) ** 2
    if clip is not None:
        held_N = old_N + (values_N - old_N).clamp(-clip, clip)
        loss_N = torch.maximum(loss_N, (held_N - returns_N) ** 2)
    return loss_N / 2


def mean_and_deviation(total: float, squares: float, count: float) -> tuple[float, float]:
    """Of `count` numbers whose sum, and whose squares' sum, are known (0 and 0 of none)."""
    mean = total / max(count, 1.0)
    return mean, max(0.0, squares / max(count, 1.0) - mean**2) ** 0.5
