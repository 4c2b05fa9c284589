"""Means, intervals and votes, as pure functions of plain lists."""

import math
from collections.abc import Iterable, Sequence

Z = 1.959964  # two-sided 95% of the normal distribution


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def clustered_interval(outcomes: Sequence[Sequence[float]]) -> list[float] | None:
    """95% interval of the mean of all outcomes, where those of one problem are not independent.

    With n_i outcomes of mean m_i for problem i, N = sum n_i and p = sum n_i m_i / N, the standard error is
    sqrt(P / (P - 1) * sum (n_i (m_i - p))^2) / N over P problems (the ratio estimator of cluster sampling,
    Cochran 1977, section 6.3); with equally many samples each it is the standard deviation of the m_i over
    sqrt(P). The interval is p -+ 1.96 standard errors, cut to [0, 1]. With one sample per problem, or where
    all problems score alike and the deviation says nothing: Wilson's interval, each problem counting once.
    """
    clusters = [rows for rows in outcomes if rows]
    if not clusters:
        return None
    problems, total = len(clusters), sum(map(len, clusters))
    p = sum(map(sum, clusters)) / total
    spread = sum((sum(rows) - len(rows) * p) ** 2 for rows in clusters)
    if total == problems or problems == 1 or spread < 1e-12:
        return wilson(p, problems)
    error = math.sqrt(problems / (problems - 1) * spread) / total
    return [max(0.0, p - Z * error), min(1.0, p + Z * error)]


def wilson(p: float, n: int) -> list[float]:
    """95% interval of a share p of n independent trials (Wilson 1927); sensible at 0 and 1 too."""
    middle = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + Z * Z / n)), min(1.0, (middle + half) / (1 + Z * Z / n))]


def majority(votes: Sequence[tuple[str, bool]]) -> bool:
    """Whether the most frequent answer is right; answers are (normalised answer, right?), "" abstains.

    The first to appear wins a tie. No answer at all is wrong.
    """
    counts: dict[str, int] = {}
    right: dict[str, bool] = {}
    for answer, correct in votes:
        if answer:
            counts[answer] = counts.get(answer, 0) + 1
            right.setdefault(answer, correct)
    return bool(counts) and right[max(counts, key=lambda answer: counts[answer])]


def majority_in_blocks(votes: Sequence[tuple[str, bool]], size: int) -> float | None:
    """The share of blocks of `size` consecutive votes whose majority is right: maj@size, no sample counted
    twice. None where there are fewer votes."""
    starts = range(0, len(votes) - size + 1, size)
    return mean(float(majority(votes[start : start + size])) for start in starts)


def pass_at(n: int, right: int, k: int) -> float:
    """The unbiased estimate of pass@k from n samples, `right` of them correct: 1 - C(n - right, k) / C(n, k)
    (Chen et al. 2021, arXiv 2107.03374, equation 1). n must be at least k."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of them do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
