"""Rule rewards: one file per reward, and `score_all`, which scores a batch.

A verifier or sandbox that fails is never a wrong answer (core.types.Status).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from r1pipe.chat.template import Chat
from r1pipe.config import RewardsConfig
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.rewards.accuracy import accuracy as accuracy_reward
from r1pipe.rewards.accuracy import check_gold, is_correct, is_verifiable, summary_of, votes
from r1pipe.rewards.cosine import cosine
from r1pipe.rewards.equation import calculation, equation
from r1pipe.rewards.format import format_reward
from r1pipe.rewards.language import language as language_reward
from r1pipe.rewards.language import language_share
from r1pipe.rewards.overlong import overlong
from r1pipe.rewards.repetition import repetition
from r1pipe.rewards.symbolic import WORKERS

__all__ = [
    "BASE_REWARDS",
    "SHAPING_REWARDS",
    "Verdicts",
    "add_shaping_rewards",
    "check_gold",
    "is_correct",
    "is_verifiable",
    "language_share",
    "score_all",
    "summary_of",
    "votes",
]

BASE_REWARDS: dict[str, Callable[[Prompt, Completion], Score | None]] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "language": language_reward,
    "equation": equation,
    "calculation": calculation,
}


# Optional rewards. Arguments: stage.rewards, stage.sampling.max_tokens, the completion and its accuracy (None
# where no rule applies). Result: None where the reward needs accuracy and has none.
SHAPING_REWARDS: dict[str, Callable[[RewardsConfig, int, Completion, Score | None], Score | None]] = {
    "cosine": cosine,
    "overlong": overlong,
    "repetition": repetition,
}


class Verdicts:
    """Accuracy in the background: finished completions are checked while the sampler still draws the others.

    Equal summaries of one prompt are checked once. A slow check waits for a process (symbolic.py, monty.py,
    jail.py), so threads suffice; none touches torch. Leaving the `with` block cancels what has not begun.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(WORKERS)
        self._futures: dict[tuple[str, str], Future[Score]] = {}

    def __enter__(self) -> "Verdicts":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """As leaving the `with` block."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, prompt: Prompt, completion: Completion) -> Future[Score] | None:
        """Starts the check of a completion, unless an equal one is running; None where no rule applies."""
        if not is_verifiable(prompt):
            return None
        key = (prompt.id, summary_of(completion.text))
        if key not in self._futures:
            self._futures[key] = self._threads.submit(accuracy_reward, prompt, completion)
        return self._futures[key]

    def on_completion(self, chat: Chat, prompts: Sequence[Prompt]) -> Callable[[int, Completion], None]:
        """The sampler's callback (prompt index, completion): decodes a completion, then checks it."""

        def check(index: int, completion: Completion) -> None:
            completion.text = chat.response(completion.tokens)
            self.submit(prompts[index], completion)

        return check

    def results(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score | None]:
        """The accuracy of completion i for prompt i, once checked; None where no rule applies.

        Raises what a check raised.
        """
        futures = [self.submit(p, c) for p, c in zip(prompts, completions, strict=True)]
        return [None if future is None else future.result() for future in futures]


def score_all(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    names: Sequence[str],
    verdicts: Verdicts | None = None,
) -> list[dict[str, Score]]:
    """Score completion i against prompt i under every named reward of BASE_REWARDS.

    `accuracy` is absent for a general prompt, where no rule applies. `verdicts` may hold checks already
    running. Raises ConfigError on an unknown name.
    """
    if verdicts is None:
        with Verdicts() as fresh:
            return score_all(prompts, completions, names, fresh)
    for name in names:
        if name not in BASE_REWARDS:
            raise ConfigError(f"reward {name} is unknown; {nearest(name, [*BASE_REWARDS, *SHAPING_REWARDS])}")
    scores: list[dict[str, Score]] = [{} for _ in completions]
    for name in names:
        if name == "accuracy":
            values = verdicts.results(prompts, completions)
        else:
            values = [BASE_REWARDS[name](p, c) for p, c in zip(prompts, completions, strict=True)]
        for row, score in zip(scores, values, strict=True):
            if score is not None:
                row[name] = score
    return scores


def add_shaping_rewards(
    scores: Sequence[dict[str, Score]],
    completions: Sequence[Completion],
    names: Sequence[str],
    config: RewardsConfig,
    max_tokens: int,
) -> None:
    """Add the named rewards of SHAPING_REWARDS to scores that hold `accuracy`, where a rule applies.

    `cosine`, which is built on it, is absent where accuracy is. `max_tokens`: the longest completion that the
    sampler draws.
    """
    for row, completion in zip(scores, completions, strict=True):
        for name in names:
            score = SHAPING_REWARDS[name](config, max_tokens, completion, row.get("accuracy"))
            if score is not None:
                row[name] = score
