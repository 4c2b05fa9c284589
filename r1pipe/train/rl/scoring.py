"""The reward of each completion: the weighted sum of its scores, NaN where one of them failed.

And dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): which of the sampled groups a step trains on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Protocol

from r1pipe.config import RLConfig
from r1pipe.config.judge import REWARDS as JUDGE_REWARDS
from r1pipe.core.types import Completion, Group, Prompt, Score, Status
from r1pipe.rewards import (
    SHAPING_REWARDS,
    Verdicts,
    add_shaping_rewards,
    is_verifiable,
    score_all,
)
from r1pipe.rewards.custom import CustomRewards
from r1pipe.runs.reward_model_quality import KINDS
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rl.advantages import group_advantages, has_variance, most_varied

# Of general prompts only, reward models and a judge: name -> a score for each of many completions.
RewardModels = Mapping[str, Callable[[Sequence[Prompt], Sequence[Completion]], list[Score]]]


class BatchScorer(Protocol):
    """Scores completions of any prompt besides the rules, all of a batch at once."""

    weights: dict[str, float]  # of the one reward that it gives, by name

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """In order; all ranks call, each with its own."""

    def finish(self) -> None:
        """After the last step, before the record is written; all ranks call."""


KL = "kl"  # the score that holds a completion's KL, where the KL is in the reward
MEASURED = ("accuracy", "format", "language")  # scored and logged even at weight 0


def reward_weights(config: RLConfig) -> dict[str, float]:
    """The weight of each reward in the sum: rules, reward models and the KL."""
    weights = dict(config.rewards.weights)
    if config.preference:
        preference = (config.preference.helpful_weight, config.preference.harmless_weight)
        weights |= dict(zip(KINDS, preference, strict=True))
    if config.kl_in == "reward":
        weights[KL] = -config.kl_coef
    return weights


def total_reward(
    scores: Mapping[str, Score], weights: Mapping[str, float], truncation_penalty: float, truncated: bool
) -> float:
    """Weighted sum, plus `truncation_penalty` if the completion was cut off. NaN where a reward with a weight
    failed: a verifier's failure is not a wrong answer."""
    weighed = {name: score for name, score in scores.items() if weights.get(name)}
    if any(score.status is not Status.SCORED for score in weighed.values()):
        return math.nan
    total = sum(weights[name] * score.value for name, score in weighed.items())
    return total + truncation_penalty * truncated


def score_groups(
    groups: Sequence[Group],
    config: RLConfig,
    weights: Mapping[str, float],
    reward_models: RewardModels,
    kls: Sequence[float] | None = None,
    verdicts: Verdicts | None = None,
    custom: CustomRewards | None = None,
    scorer: BatchScorer | None = None,
) -> None:
    """Set the groups' scores and rewards, which completions are trained on, and their advantages.

    Rules, `custom` rewards and a `scorer` score every completion, `reward_models` (and a judge model) those
    of general prompts.
    `kls` are the completions' KLs, where the KL is in the reward. `verdicts` on accuracy may already be under
    way.
    """
    completions = [completion for group in groups for completion in group.completions]
    prompts = [group.prompt for group in groups for _ in group.completions]
    names = {*MEASURED, *(name for name, weight in weights.items() if weight)} - {*KINDS, *JUDGE_REWARDS, KL}
    names -= {*(custom.names if custom else ()), *(scorer.weights if scorer else ())}
    scores = score_all(prompts, completions, sorted(names - {*SHAPING_REWARDS}), verdicts)
    shaping = sorted(names & {*SHAPING_REWARDS})
    add_shaping_rewards(scores, completions, shaping, config.rewards, config.sampling.max_tokens)
    if custom:
        add_custom_rewards(scores, groups, custom)
    if scorer:
        [name] = scorer.weights
        for row, score in zip(scores, scorer.score(prompts, completions), strict=True):
            row[name] = score
    general = [i for i, prompt in enumerate(prompts) if not is_verifiable(prompt)]
    for name, reward_model in reward_models.items():  # on all ranks: it may be sharded
        values = reward_model([prompts[i] for i in general], [completions[i] for i in general])
        for i, score in zip(general, values, strict=True):
            scores[i][name] = score
    if kls is not None:
        for row, kl in zip(scores, kls, strict=True):
            row[KL] = Score(kl)
    rows = iter(scores)
    for group in groups:
        group.scores = [next(rows) for _ in group.completions]
        group.rewards = [
            total_reward(row, weights, config.rewards.truncation_penalty, completion.truncated)
            for row, completion in zip(group.scores, group.completions, strict=True)
        ]
        group.kept = most_varied(group.rewards, config.trained_per_group or len(group.rewards))
        of_kept = group_advantages([group.rewards[place] for place in group.kept], config.normalise_std)
        group.advantages = [0.0] * len(group.rewards)
        for place, advantage in zip(group.kept, of_kept, strict=True):
            group.advantages[place] = advantage


def add_custom_rewards(
    scores: Sequence[dict[str, Score]], groups: Sequence[Group], custom: CustomRewards
) -> None:
    """Add the custom rewards to the scores of the groups' completions, in order; one that has no rule for a
    prompt is absent there."""
    given = [(group.prompt, group.completions) for group in groups]
    for name in custom.names:
        for row, score in zip(scores, chain.from_iterable(custom.score(name, given)), strict=True):
            if score is not None:
                row[name] = score


def has_signal(group: Group, weights: Mapping[str, float]) -> bool:
    """Whether the answers' rewards differ within the group. DAPO (eq. 11) compares right and wrong answers;
    here every weighted reward counts but length, repetition and KL, which differ in every group."""
    of_answers = {name: weight for name, weight in weights.items() if name not in (KL, *SHAPING_REWARDS)}
    return has_variance([total_reward(scores, of_answers, 0.0, False) for scores in group.scores])


def redistribute_groups(
    ranks: Ranks, groups: Sequence[Group], weights: Mapping[str, float], wanted: int
) -> list[Group]:
    """Choose `wanted` groups of all ranks for training: the first with a signal, then the first others.
    Returns this rank's share of them, followed by those it sampled itself that were not chosen."""
    marks = [(not has_signal(group, weights), group.place) for group in groups]
    order = sorted(mark for of_rank in ranks.all_gather_objects(marks) for mark in of_rank)
    chosen = {place: number for number, (_, place) in enumerate(order[:wanted])}
    for group in groups:
        group.trained = group.place in chosen
    sent = [group for group in groups if group.trained]
    trained = [group for of_rank in ranks.all_gather_objects(sent) for group in of_rank]
    trained.sort(key=lambda group: chosen[group.place])
    return trained[ranks.rank :: ranks.world_size] + [group for group in groups if not group.trained]
