"""Win rates against a baseline: raw, and as if both answers were equally long.

AlpacaEval 2's length-controlled win rate (arXiv 2404.04475) fits a logistic regression to the judge's
preferences and reads it where the difference in length is 0. Its term for each instruction's difficulty,
which needs the answers of many models, is left out here.
"""

import math
from collections.abc import Sequence
from statistics import pstdev
from typing import Any

import numpy as np

from r1pipe.core.estimates import clustered_interval, mean

RIDGE = 1e-2  # on the length's coefficient: preferences that length separates have no finite fit
STEPS = 100  # of Newton's method; it takes about ten


def win_rates(margins: Sequence[float | None], lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The share of answers that are preferred to the baseline's; a tie is half. `margins` are above 0 where
    the answer is preferred, None without a verdict; `lengths` are of the answer and of the baseline's."""
    read = [(margin, pair) for margin, pair in zip(margins, lengths, strict=True) if margin is not None]
    wins = [0.5 if margin == 0 else float(margin > 0) for margin, _ in read]
    return {
        "n": len(margins),
        "without_verdict": len(margins) - len(read),
        "wins": wins.count(1.0),
        "ties": wins.count(0.5),
        "losses": wins.count(0.0),
        "win_rate": mean(wins),
        "win_rate_ci": clustered_interval([[win] for win in wins]),
        "length_controlled": length_controlled(wins, [first - second for _, (first, second) in read]),
        "longer": mean(float(first > second) for _, (first, second) in read),
    }


def length_controlled(wins: Sequence[float], gains: Sequence[int]) -> float | None:
    """The win rate at equal lengths: sigmoid(theta), where P(win) = sigmoid(theta + phi tanh(gain / deviation
    of the gains)) is fitted by maximum likelihood, ridge on phi. None without a verdict."""
    if not wins:
        return None
    deviation = pstdev(gains) if len(gains) > 1 else 0.0
    x = np.array([math.tanh(gain / deviation) if deviation else 0.0 for gain in gains])
    design, target = np.stack([np.ones_like(x), x], axis=1), np.array(wins)
    penalty = np.diag([RIDGE, RIDGE])
    weights = np.zeros(2)
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (p - target) + penalty @ weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + penalty
        step = np.linalg.solve(hessian, gradient)
        weights -= step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + math.exp(-weights[0])))
