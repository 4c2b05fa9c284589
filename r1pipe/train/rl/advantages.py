"""Group-relative advantages (DeepSeekMath section 4.1.2): the group's mean stands in for a value model."""

import math

SAME_REWARD = 1e-6  # a spread below this is rounding, not a difference


def is_scored(reward: float) -> bool:
    """Whether a completion was judged: the reward of one that was not is NaN, and never trains."""
    return not math.isnan(reward)


def has_variance(rewards_G: list[float]) -> bool:
    """Whether a group can teach anything: at least two different rewards."""
    known = list(filter(is_scored, rewards_G))
    return bool(known) and max(known) - min(known) > SAME_REWARD


def group_advantages(rewards_G: list[float], normalise_std: bool) -> list[float]:
    """A_i = (r_i - mean(r)) / std(r) over the judged members of one group; 0 for the others.

    The standard deviation is the population's (divided by the number of members). Without `normalise_std` it
    is left out, so that groups with rare rewards do not weigh more (Dr.GRPO, arXiv 2503.20783).
    """
    if not has_variance(rewards_G):
        return [0.0] * len(rewards_G)
    known = list(filter(is_scored, rewards_G))
    mean = math.fsum(known) / len(known)
    variance = math.fsum((reward - mean) ** 2 for reward in known) / len(known)
    scale = math.sqrt(variance) if normalise_std else 1.0
    return [(reward - mean) / scale if is_scored(reward) else 0.0 for reward in rewards_G]
