"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): which of the sampled groups a step trains on."""

from collections.abc import Mapping, Sequence

from r1pipe.core.types import Group
from r1pipe.rewards import SHAPING_REWARDS
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rl.advantages import has_variance
from r1pipe.train.rl.scoring import KL, total_reward


def has_signal(group: Group, weights: Mapping[str, float]) -> bool:
    """Whether the answers' rewards differ within the group.

    DAPO (eq. 11) compares right and wrong answers; here every weighted reward counts, except for length,
    repetition and KL, which differ in every group.
    """
    of_answers = {name: weight for name, weight in weights.items() if name not in (KL, *SHAPING_REWARDS)}
    return has_variance([total_reward(scores, of_answers, 0.0, False) for scores in group.scores])


def redistribute_groups(
    ranks: Ranks, groups: Sequence[Group], weights: Mapping[str, float], wanted: int
) -> list[Group]:
    """Choose `wanted` groups of all ranks for training: the first with a signal, then the first others.

    -> this rank's share of the chosen groups, followed by those it sampled itself that were not chosen.
    """
    marks = [(not has_signal(group, weights), group.place) for group in groups]
    order = sorted(mark for of_rank in ranks.all_gather_objects(marks) for mark in of_rank)
    chosen = {place: number for number, (_, place) in enumerate(order[:wanted])}
    for group in groups:
        group.trained = group.place in chosen
    sent = [group for group in groups if group.trained]
    trained = [group for of_rank in ranks.all_gather_objects(sent) for group in of_rank]
    trained.sort(key=lambda group: chosen[group.place])
    return trained[ranks.rank :: ranks.world_size] + [group for group in groups if not group.trained]
