"""How good a reward model is, from its scores on held-out responses; plain numbers, None where undefined."""

from collections.abc import Sequence

import numpy as np


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs whose chosen answer scores higher; a tie is half right."""
    return float(np.mean(0.5 + 0.5 * np.sign(np.subtract(chosen, rejected))))


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Area under the ROC curve: the chance that a positive scores above a negative; a tie is half."""
    values, good = np.array(scores), np.array(positive, dtype=bool)
    if good.all() or not good.any():
        return None
    return float(np.mean(0.5 + 0.5 * np.sign(np.subtract.outer(values[good], values[~good]))))


def length_correlation(scores: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Pearson's correlation of score and length: far from 0, the model may be rewarding length itself."""
    if np.std(scores) == 0 or np.std(lengths) == 0:
        return None
    return float(np.corrcoef(scores, lengths)[0, 1])
