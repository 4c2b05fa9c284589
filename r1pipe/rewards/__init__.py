"""Rule rewards: one file per reward, one table, and `score_all`, which scores a batch.

Status is tri-state (records.Status): a verifier or sandbox that fails is never a wrong answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from r1pipe.config import RewardsConfig
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.rewards.accuracy import accuracy, applies, check_gold, is_correct, summary_of, vote
from r1pipe.rewards.cosine import cosine
from r1pipe.rewards.format import format_reward
from r1pipe.rewards.language import language, language_share
from r1pipe.rewards.overlong import overlong
from r1pipe.rewards.repetition import repetition
from r1pipe.rewards.verdicts import Verdicts

__all__ = [
    "SHAPES",
    "TABLE",
    "Shaping",
    "Verdicts",
    "add_shapes",
    "applies",
    "check_gold",
    "is_correct",
    "language_share",
    "score_all",
    "summary_of",
    "vote",
]

TABLE: dict[str, Callable[[Prompt, Completion], Score]] = {
    "accuracy": accuracy,
    "format": format_reward,
    "language": language,
}


# Optional rewards, from stage.rewards, stage.sampling.max_tokens, the completion and its accuracy (None where
# no rule applies); None where the reward needs that.
SHAPES: dict[str, Callable[[RewardsConfig, int, Completion, Score | None], Score | None]] = {
    "cosine": cosine,
    "overlong": overlong,
    "repetition": repetition,
}


@dataclass(frozen=True)
class Shaping:
    """What the rewards of SHAPES are made from."""

    config: RewardsConfig
    max_tokens: int  # the longest completion that the sampler draws


def score_all(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    names: Sequence[str],
    verdicts: Verdicts | None = None,
) -> list[dict[str, Score]]:
    """Score completion i against prompt i under every named reward of TABLE.

    `accuracy` is absent from the result of a general prompt, where no rule applies. `verdicts` are those
    under way already. Raises ConfigError on an unknown name.
    """
    if verdicts is None:
        with Verdicts() as fresh:
            return score_all(prompts, completions, names, fresh)
    for name in names:
        if name not in TABLE:
            raise ConfigError(f"reward {name} is unknown; {nearest(name, [*TABLE, *SHAPES])}")
    scores: list[dict[str, Score]] = [{} for _ in completions]
    for name in names:
        if name == "accuracy":
            values = verdicts.of(prompts, completions)
        else:
            values = [TABLE[name](p, c) for p, c in zip(prompts, completions, strict=True)]
        for row, score in zip(scores, values, strict=True):
            if score is not None:
                row[name] = score
    return scores


def add_shapes(
    scores: Sequence[dict[str, Score]],
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    names: Sequence[str],
    shaping: Shaping,
) -> None:
    """Add the named rewards of SHAPES to scores that hold `accuracy`, where a rule applies.

    `cosine`, which is built on it, is absent where accuracy is.
    """
    for row, completion in zip(scores, completions, strict=True):
        for name in names:
            score = SHAPES[name](shaping.config, shaping.max_tokens, completion, row.get("accuracy"))
            if score is not None:
                row[name] = score
