"""What each completion of a step earns: the weighted sum of its rewards, NaN where one of them failed."""

import math
from collections.abc import Callable, Mapping, Sequence

from r1pipe.config import RLConfig
from r1pipe.core.types import Completion, Group, Prompt, Score, Status
from r1pipe.rewards import (
    SHAPING_REWARDS,
    ShapingInputs,
    Verdicts,
    add_shaping_rewards,
    is_verifiable,
    score_all,
)
from r1pipe.runs.reward_model_quality import KINDS
from r1pipe.train.rl.advantages import group_advantages

# Rewards that are not rules: name -> a verdict on each of many completions of general prompts.
Judges = Mapping[str, Callable[[Sequence[Prompt], Sequence[Completion]], list[Score]]]

PREFERENCES = KINDS  # the reward models' rewards, on general prompts alone
KL = "kl"  # of a completion, where it is in the reward (see r1pipe.train.rl.shaping)
MEASURED = ("accuracy", "format", "language")  # logged even where they weigh nothing


def reward_weights(config: RLConfig) -> dict[str, float]:
    """What each reward weighs in the sum: the rules', the preference rewards', and what shapes the reward."""
    weights = dict(config.rewards.weights)
    if config.preference:
        preference = (config.preference.helpful_weight, config.preference.harmless_weight)
        weights |= dict(zip(PREFERENCES, preference, strict=True))
    if config.kl_in == "reward":
        weights[KL] = -config.kl_coef
    return weights


def total_reward(
    scores: Mapping[str, Score], weights: Mapping[str, float], truncation_penalty: float, truncated: bool
) -> float:
    """Weighted sum, plus `truncation_penalty` if the completion was cut off. NaN where a reward that counts
    failed: a verifier's failure is not a wrong answer."""
    counted = {name: score for name, score in scores.items() if weights.get(name)}
    if any(score.status is not Status.SCORED for score in counted.values()):
        return math.nan
    return (
        sum(weights[name] * score.value for name, score in counted.items()) + truncation_penalty * truncated
    )


def score_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    weights: Mapping[str, float],
    judges: Judges,
    truncation_penalty: float,
    normalise_std: bool,
    shaping: ShapingInputs | None = None,
    added: Mapping[str, Sequence[float]] | None = None,
    verdicts: Verdicts | None = None,
) -> list[Group]:
    """Groups with scores, rewards and advantages; `completions` are G in a row for each prompt.

    Rule rewards judge all (accuracy where a rule applies), `judges` the general prompts alone; `shaping` is
    needed where one of the weights is that of a length or repetition reward. `added` are values that are
    known already, one for each completion: the KL, where it is in the reward. `verdicts` on accuracy may be
    under way.
    """
    size = len(completions) // len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(size)]
    weighed = {name for name, weight in weights.items() if weight}
    names = {*MEASURED, *weighed} - {*PREFERENCES, KL, *(added or {})}  # the critic brings its own KL
    scores = score_all(repeated, completions, sorted(names - {*SHAPING_REWARDS}), verdicts)
    if shaping:
        add_shaping_rewards(scores, repeated, completions, sorted(names & {*SHAPING_REWARDS}), shaping)
    general = [i for i, prompt in enumerate(repeated) if not is_verifiable(prompt)]
    for name, judge in judges.items():
        judged = judge([repeated[i] for i in general], [completions[i] for i in general]) if general else []
        for i, verdict in zip(general, judged, strict=True):
            scores[i][name] = verdict
    for name, values in (added or {}).items():
        for score, value in zip(scores, values, strict=True):
            score[name] = Score(value)
    groups = []
    for number, prompt in enumerate(prompts):
        mine = slice(number * size, (number + 1) * size)
        rewards = [
            total_reward(score, weights, truncation_penalty, completion.truncated)
            for score, completion in zip(scores[mine], completions[mine], strict=True)
        ]
        advantages = group_advantages(rewards, normalise_std)
        groups.append(Group(prompt, list(completions[mine]), scores[mine], rewards, advantages))
    return groups
