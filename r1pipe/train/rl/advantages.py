"""Advantages: relative to a group (GRPO) or to a value model (PPO), as pure functions.

Axes: G completions of one prompt, T tokens of one completion.
"""

import math
from statistics import pvariance

import torch
from torch import Tensor

SAME_REWARD = 1e-6  # a smaller spread is rounding


def is_scored(reward: float) -> bool:
    """Whether scoring worked: the reward of a completion whose scoring failed is NaN, and never trains."""
    return not math.isnan(reward)


def has_variance(rewards_G: list[float]) -> bool:
    """Whether a group can teach anything: at least two different rewards."""
    scored = list(filter(is_scored, rewards_G))
    return bool(scored) and max(scored) - min(scored) > SAME_REWARD


def group_advantages(rewards_G: list[float], normalise_std: bool) -> list[float]:
    """A_i = (r_i - mean(r)) / std(r) over a group's scored members; 0 for the others.

    The mean replaces a value model (DeepSeekMath section 4.1.2). Without `normalise_std` the population's
    deviation is left out: groups with rare rewards do not weigh more (Dr.GRPO, arXiv 2503.20783).
    """
    if not has_variance(rewards_G):
        return [0.0] * len(rewards_G)
    scored = list(filter(is_scored, rewards_G))
    mean = math.fsum(scored) / len(scored)
    variance = math.fsum((reward - mean) ** 2 for reward in scored) / len(scored)
    scale = math.sqrt(variance) if normalise_std else 1.0
    return [(reward - mean) / scale if is_scored(reward) else 0.0 for reward in rewards_G]


def most_varied(rewards_G: list[float], count: int) -> list[int]:
    """The `count` members of a group whose rewards have the largest variance, in order (max-variance
    down-sampling, PODS, arXiv 2504.13818, section 3.2): some of the lowest and some of the highest. Those
    whose scoring failed come last."""
    scored = sorted(
        (place for place, reward in enumerate(rewards_G) if is_scored(reward)), key=rewards_G.__getitem__
    )
    failed = [place for place, reward in enumerate(rewards_G) if not is_scored(reward)]
    if len(scored) <= count:
        return sorted(scored + failed[: count - len(scored)])
    choices = [scored[:low] + scored[len(scored) - count + low :] for low in range(count + 1)]
    return sorted(max(choices, key=lambda places: pvariance([rewards_G[place] for place in places])))


def token_rewards(score: float, kl_T: Tensor | None, kl_coef: float, length: int) -> Tensor:
    """rewards_T: minus each token's KL, and the completion's score at its last token (DeepSeekMath eq. 2)."""
    rewards_T = torch.zeros(length) if kl_T is None else -kl_coef * kl_T.cpu()
    rewards_T[-1] += score
    return rewards_T


def gae(rewards_T: Tensor, values_T: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """advantages_T: A_t = d_t + gamma lambda A_(t+1) with d_t = r_t + gamma V_(t+1) - V_t (Schulman et al.,
    arXiv 1506.02438, eq. 16). The value after the last token is 0, also for a truncated answer."""
    next_T = torch.cat([values_T[1:], values_T.new_zeros(1)])
    deltas = (rewards_T + gamma * next_T - values_T).tolist()
    advantages, later = [0.0] * len(deltas), 0.0
    for t in reversed(range(len(deltas))):
        later = deltas[t] + gamma * gae_lambda * later
        advantages[t] = later
    return torch.tensor(advantages)
