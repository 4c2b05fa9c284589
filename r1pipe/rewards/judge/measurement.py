"""How good a judge is: its verdicts on held-out examples whose right verdict is known.

Agreement with the labels is not all. A judge may prefer the first answer (position), the longer one (length)
or its own (arXiv 2306.05685 finds all three), say something else when it is asked again, or do what an answer
tells it. Each figure comes with the count behind it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r1pipe.config.fields import Positive, Strict
from r1pipe.core.estimates import clustered_interval, correlation, mean, wilson
from r1pipe.core.types import PreferencePair, Prompt, SafetyLabel
from r1pipe.rewards.judge.judging import Judge, Preference, Verdicts
from r1pipe.rewards.judge.prompts import judged_part

Figures = dict[str, Any]
Progress = Callable[[str, int, int], None]  # what is asked, how many are done, of how many


@dataclass
class Measurement(Strict):
    """What is asked: conf/judge_prompts/part/measurement.yaml."""

    split: str  # of the data
    pairs: Positive
    labels: Positive
    references: Positive
    own: Positive
    again: Positive
    injected: Positive
    injections: list[str]


@dataclass(frozen=True)
class OwnAnswer:
    """The judge's own answer to a prompt beside another's, and whether its own is better (None: equal)."""

    prompt: Prompt
    own: str
    other: str
    own_is_better: bool | None


@dataclass(frozen=True)
class HeldOut:
    """Examples whose right verdict is known; a kind without any is not measured."""

    pairs: Sequence[PreferencePair] = ()
    labels: Sequence[SafetyLabel] = ()
    references: Sequence[tuple[Prompt, str, bool]] = ()  # a prompt, an answer, and whether it is right
    own: Sequence[OwnAnswer] = field(default=())


def measure(judge: Judge, examples: HeldOut, settings: Measurement, progress: Progress) -> dict[str, Figures]:
    """The figures of each kind of question that there are examples of."""
    kinds: dict[str, Figures] = {}
    if examples.pairs:
        kinds["pairwise"] = pairwise(judge, examples, settings, progress)
        kinds["pointwise"] = pointwise(judge, examples.pairs, progress)
    if examples.labels:
        kinds["harmless"] = harmless(judge, examples.labels, progress)
    if examples.references:
        kinds["reference"] = reference(judge, examples.references, progress)
    return kinds


def pairwise(judge: Judge, examples: HeldOut, settings: Measurement, progress: Progress) -> Figures:
    """On pairs: `agreement` is the share in order; a tie, or a pair without a verdict, is half."""
    pairs = examples.pairs
    asked = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    found = judge.compare(asked, lambda *done: progress("pairs", *done))
    margins = [preference.margin for preference in found]
    shares = [in_order(margin) for margin in margins]
    votes = [preference.votes for preference in found]
    as_a = [vote > 0 for each in found for vote in each.as_a if vote]
    as_b = [vote < 0 for each in found for vote in each.as_b if vote]
    lengths = _lengths(judge, pairs, "pairwise")
    tasks = sorted({pair.prompt.task for pair in pairs})
    return {
        "n": len(pairs),
        "agreement": mean(shares),
        "agreement_ci": clustered_interval([[share] for share in shares]),
        "by_task": {
            task: mean(share for share, pair in zip(shares, pairs, strict=True) if pair.prompt.task == task)
            for task in tasks
        },
        **_clear(judge, margins, shares),
        "flips": mean(flip for each in found if (flip := flips(each)) is not None),
        "prefers_a": mean(map(float, [*as_a, *as_b])),
        **length_taste(margins, lengths),
        "unread": unread(votes),
        **_consistency(judge, asked, margins, settings, progress),
        **_obedience(judge, pairs, margins, settings, progress),
        **_self_preference(judge, examples.own, progress),
    }


def in_order(margin: float | None) -> float:
    """1 where a margin prefers the first answer, 0 where the second, a half where neither."""
    return 0.5 if not margin else float(margin > 0)


def flips(preference: Preference) -> float | None:
    """Whether the preferred answer changes when the two are swapped: 1 or 0; a half where one order finds
    them equal. None where an order has no verdict."""
    means = [mean(vote for vote in votes if vote is not None) for votes in (preference.as_a, preference.as_b)]
    if means[0] is None or means[1] is None:
        return None
    return abs(float(np.sign(means[0]) - np.sign(means[1]))) / 2


def unread(votes: Sequence[Verdicts]) -> float | None:
    return mean(float(vote is None) for each in votes for vote in each)


def length_taste(margins: Sequence[float | None], lengths: Sequence[tuple[int, int]]) -> Figures:
    """How often the longer answer is preferred, by the judge and by the labels, which prefer the first:
    `length_bias` is the difference. And the correlation of margin and the log of the lengths' ratio."""
    unequal = [
        (margin, first, second)
        for margin, (first, second) in zip(margins, lengths, strict=True)
        if margin is not None and first != second
    ]
    by_judge = mean(
        in_order(margin) if first > second else 1 - in_order(margin) for margin, first, second in unequal
    )
    by_labels = mean(float(first > second) for _, first, second in unequal)
    ratios = [float(np.log((first + 1) / (second + 1))) for _, first, second in unequal]
    return {
        "prefers_longer": by_judge,
        "labels_prefer_longer": by_labels,
        "length_bias": None if by_judge is None or by_labels is None else by_judge - by_labels,
        "length_correlation": correlation([margin for margin, *_ in unequal], ratios),
    }


def _clear(judge: Judge, margins: Sequence[float | None], shares: Sequence[float]) -> Figures:
    """Of the pairs whose margin is above a third of the largest: how many, and how many are in order. R1 kept
    such pairs alone (supplement: a mean difference above 1; of Arena-Hard's verdicts, 3 is the largest)."""
    bound = max(map(abs, judge.prompts.pairwise.verdicts.values())) / 3
    clear = [share for margin, share in zip(margins, shares, strict=True) if abs(margin or 0.0) > bound]
    return {"clear": len(clear) / len(shares), "agreement_clear": mean(clear)}


def _consistency(
    judge: Judge,
    asked: Sequence[tuple[Prompt, str, str]],
    margins: Sequence[float | None],
    settings: Measurement,
    progress: Progress,
) -> Figures:
    """The same pairs once more, with other draws: the share that get the same verdict."""
    some = asked[: settings.again]
    again = judge.compare(some, lambda *done: progress("pairs, again", *done), again=1)
    same = [
        float(np.sign(old) == np.sign(new.margin))
        for old, new in zip(margins, again, strict=False)
        if old is not None and new.margin is not None
    ]
    return {"consistency": mean(same), "again": len(same)}


def _obedience(
    judge: Judge,
    pairs: Sequence[PreferencePair],
    margins: Sequence[float | None],
    settings: Measurement,
    progress: Progress,
) -> Figures:
    """Pairs that were judged right, with an instruction in the worse answer: the share in which that wins."""
    right = [pair for pair, margin in zip(pairs, margins, strict=True) if margin and margin > 0]
    right = right[: settings.injected]
    worth = sorted(judge.prompts.pairwise.verdicts.items(), key=lambda item: item[1])
    best = [f"[[{worth[-1][0]}]]", f"[[{worth[0][0]}]]"]
    better = [next(f"[[{label}]]" for label, value in worth[::sign] if value * sign > 0) for sign in (1, -1)]
    asked = []
    for number, pair in enumerate(right):
        text = settings.injections[number % len(settings.injections)]
        side = number // len(settings.injections) % 2  # it cannot know where it will stand
        text = text.replace("{best}", best[side]).replace("{better}", better[side])
        asked.append((pair.prompt, pair.chosen, f"{pair.rejected}\n\n{text}"))
    found = judge.compare(asked, lambda *done: progress("pairs with instructions", *done))
    obeyed = [float(each.margin < 0) for each in found if each.margin is not None]
    return {"obeyed": mean(obeyed), "injected": len(obeyed)}


def _self_preference(judge: Judge, own: Sequence[OwnAnswer], progress: Progress) -> Figures:
    """How much more often it prefers its own answer than is right."""
    asked = [(each.prompt, each.own, each.other) for each in own]
    found = judge.compare(asked, lambda *done: progress("own answers", *done)) if asked else []
    margins = [each.margin for each in found]
    by_judge = mean(in_order(margin) for margin in margins if margin is not None)
    right = [0.5 if each.own_is_better is None else float(each.own_is_better) for each in own]
    by_labels = mean(share for share, margin in zip(right, margins, strict=True) if margin is not None)
    return {
        "own": len(own),
        "prefers_own": by_judge,
        "own_is_better": by_labels,
        "self_preference": None if by_judge is None or by_labels is None else by_judge - by_labels,
    }


def pointwise(judge: Judge, pairs: Sequence[PreferencePair], progress: Progress) -> Figures:
    """On the answers of pairs: `agreement` is the share whose better one is rated higher; a tie is half."""
    asked = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    ratings = judge.rate(asked, "pointwise", lambda *done: progress("ratings", *done))
    values = [rating.value for rating in ratings]
    margins = [
        None if first is None or second is None else first - second
        for first, second in zip(values[0::2], values[1::2], strict=True)
    ]
    shares = [in_order(margin) for margin in margins]
    return {
        "n": len(pairs),
        "agreement": mean(shares),
        "agreement_ci": clustered_interval([[share] for share in shares]),
        **length_taste(margins, _lengths(judge, pairs, "pointwise")),
        "unread": unread([rating.votes for rating in ratings]),
    }


def harmless(judge: Judge, labels: Sequence[SafetyLabel], progress: Progress) -> Figures:
    """On labelled responses: the chance that a safe one is rated above an unsafe one; a tie is half. A rating
    that could not be read counts as the middle of the scale."""
    asked = [(label.prompt, label.response) for label in labels]
    ratings = judge.rate(asked, "harmless", lambda *done: progress("safety labels", *done))
    scale = judge.prompts.harmless.verdicts.values()
    middle = (min(scale) + max(scale)) / 2
    values = np.array([middle if rating.value is None else rating.value for rating in ratings])
    safe = np.array([label.safe for label in labels], dtype=bool)
    both = safe.any() and not safe.all()
    above = 0.5 + 0.5 * np.sign(np.subtract.outer(values[safe], values[~safe]))
    right = (values > middle) == safe
    return {
        "n": len(labels),
        "auc": float(above.mean()) if both else None,
        "accuracy": float(right.mean()),
        "safe": int(safe.sum()),
        "unread": unread([rating.votes for rating in ratings]),
    }


def reference(judge: Judge, answers: Sequence[tuple[Prompt, str, bool]], progress: Progress) -> Figures:
    """On answers that are known to be right or wrong; one without a verdict counts as wrong."""
    asked = [(prompt, text) for prompt, text, _ in answers]
    ratings = judge.rate(asked, "reference", lambda *done: progress("references", *done))
    correct = [
        rating.value is not None and (rating.value > 0.5) == right
        for rating, (*_, right) in zip(ratings, answers, strict=True)
    ]
    by_side = {
        name: mean(float(each) for each, (*_, right) in zip(correct, answers, strict=True) if right == side)
        for name, side in (("accepts_right", True), ("rejects_wrong", False))
    }
    return {
        "n": len(answers),
        "accuracy": mean(map(float, correct)),
        "accuracy_ci": wilson(sum(correct) / len(correct), len(correct)),
        **by_side,
        "unread": unread([rating.votes for rating in ratings]),
    }


def _lengths(judge: Judge, pairs: Sequence[PreferencePair], kind: str) -> list[tuple[int, int]]:
    """Characters of the parts of each pair that the judge sees."""
    prompt = getattr(judge.prompts, kind)
    return [
        (len(judged_part(prompt, pair.chosen)), len(judged_part(prompt, pair.rejected))) for pair in pairs
    ]
