"""Preference pairs that a judge ranks, as R1 made those of its helpfulness model (supplement).

V3 judged each pair four times, the answers in random order; pairs with a mean difference above 1 were kept,
and chosen and rejected answers were made about as long over the whole set, so that length says nothing.
"""

from collections.abc import Sequence

from r1pipe.chat.answerer import Progress
from r1pipe.core.types import PreferencePair
from r1pipe.rewards.judge.judging import Judge
from r1pipe.rewards.judge.prompts import judged_part

Ranked = tuple[list[PreferencePair], dict[str, int]]


def rank_pairs(
    judge: Judge,
    pairs: Sequence[PreferencePair],
    min_margin: float,
    balance: bool,
    progress: Progress | None = None,
) -> Ranked:
    """The pairs as the judge ranks them, whatever their labels say, and how many were left out for what."""
    found = judge.compare([(pair.prompt, pair.chosen, pair.rejected) for pair in pairs], progress)
    kept: list[PreferencePair] = []
    left = {"without a verdict": 0, "too close": 0, "for their length": 0}
    for pair, preference in zip(pairs, found, strict=True):
        if preference.margin is None:
            left["without a verdict"] += 1
        elif abs(preference.margin) <= min_margin:
            left["too close"] += 1
        else:
            swapped = preference.margin < 0
            chosen, rejected = (pair.rejected, pair.chosen) if swapped else (pair.chosen, pair.rejected)
            kept.append(PreferencePair(pair.prompt, chosen, rejected))
    if balance:
        balanced = balance_lengths(kept, [length_gain(judge, pair) for pair in kept])
        left["for their length"] = len(kept) - len(balanced)
        kept = balanced
    return kept, left


def length_gain(judge: Judge, pair: PreferencePair) -> int:
    """By how many characters the chosen answer is longer, of the part that is judged."""
    prompt = judge.prompts.pairwise
    return len(judged_part(prompt, pair.chosen)) - len(judged_part(prompt, pair.rejected))


def balance_lengths(pairs: Sequence[PreferencePair], gains: Sequence[int]) -> list[PreferencePair]:
    """The pairs without those whose chosen answer is longer by most (or shorter, where that is the rule), as
    few as it takes until both are as long on average, in their order."""
    total = sum(gains)
    sign = 1 if total > 0 else -1
    dropped: set[int] = set()
    for place in sorted(range(len(pairs)), key=lambda i: (-sign * gains[i], i)):
        if sign * total <= 0 or sign * gains[place] <= 0:
            break
        dropped.add(place)
        total -= gains[place]
    return [pair for place, pair in enumerate(pairs) if place not in dropped]
