"""What answers to general prompts are really worth, beside what each judge of the stage says of them.

The bundled world has a hidden truth. No reward reads it; here it shows whether a reward is hacked: the
judge's scores rise step by step while the truth stays or falls (Gao et al., arXiv 2210.10760).
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from r1pipe.core.estimates import correlation
from r1pipe.core.types import Group, Prompt, Status
from r1pipe.data.world.truth import Truth
from r1pipe.rewards import is_verifiable
from r1pipe.train.engine.ranks import Ranks

# A judge's reward -> what it is to measure. Reward models and generative judges alike.
MEASURES = {"helpful": "helpful", "judge": "helpful", "harmless": "harmless", "judge_harmless": "harmless"}

Values = dict[str, float]


def hidden_truth(
    ranks: Ranks, groups: Sequence[Group], truth_of: Callable[[Prompt, str], Truth] | None
) -> dict[str, float]:
    """Metrics of a step's general completions, of all ranks: mean truth, and for each judge how far its mean
    is above that, and the correlation of both; {} where the data has no truth, or the step no such prompt."""
    if truth_of is None:
        return {}
    mine = [row for group in groups if not is_verifiable(group.prompt) for row in _rows(group, truth_of)]
    rows = [row for share in ranks.all_gather_objects(mine) for row in share]
    if not rows:
        return {}
    metrics = {f"truth/{name}": fmean(truth[name] for truth, _ in rows) for name in rows[0][0]}
    for name, measured in MEASURES.items():
        pairs = [(scores[name], truth[measured]) for truth, scores in rows if name in scores]
        if pairs:
            said, is_so = [list(values) for values in zip(*pairs, strict=True)]
            metrics[f"truth/{name}/gap"] = fmean(said) - fmean(is_so)
            related = correlation(said, is_so)
            if related is not None:
                metrics[f"truth/{name}/correlation"] = related
    return metrics


def _rows(group: Group, truth_of: Callable[[Prompt, str], Truth]) -> list[tuple[Values, Values]]:
    """For each completion the truth, and its scores by judges."""
    found = []
    for completion, scores in zip(group.completions, group.scores, strict=True):
        truth = truth_of(group.prompt, completion.text)
        said = {
            name: score.value
            for name, score in scores.items()
            if name in MEASURES and score.status is Status.SCORED
        }
        found.append(
            ({"helpful": truth.helpful, "harmless": float(truth.safe), "correct": float(truth.correct)}, said)
        )
    return found
