"""Which prompts a step learns from: streams whose only state is a cursor."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from r1pipe.config import RLConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Prompt

POOL = 16_384  # prompts drawn from the source at once: more would only wait in memory
PATIENCE = 1_000  # prompts in a row that do not fit, before no other one is looked for


class PromptStream:
    """Pool after pool of a source's prompts, each drawn with a seed of its own: shuffled epochs of a file,
    new problems of an endless source."""

    def __init__(
        self,
        draw: Callable[[int, int], list[Prompt]],
        seed_of: Callable[[int], int],
        fits: Callable[[Prompt], bool],
        needed: int,
        what: str,
    ):
        """`draw(n, seed)` gives up to n prompts, as many for every seed; the stage takes `needed` in all.

        Prompts that do not fit into the context are passed over. Raises DataError where there is none.
        """
        size = min(needed, POOL)
        self._pool = lru_cache(maxsize=2)(lambda number: draw(size, seed_of(number)))
        self._fits, self._what = fits, what
        self._length = len(self._pool(0))
        if not self._length:
            raise DataError(f"the data has no {what}; choose another with data=")

    def take(self, cursor: int, n: int) -> tuple[list[Prompt], int]:
        """The next n prompts from `cursor` on, and the cursor after them."""
        taken: list[Prompt] = []
        passed_over = 0
        while len(taken) < n:
            prompt = self._pool(cursor // self._length)[cursor % self._length]
            cursor += 1
            if self._fits(prompt):
                taken.append(prompt)
                passed_over = 0
            elif (passed_over := passed_over + 1) > max(self._length, PATIENCE):
                raise DataError(
                    f"none of {passed_over:,} {self._what} leaves room for stage.sampling.max_tokens in "
                    "model.max_position_embeddings; lower the first or take a model with a longer context"
                )
        return taken, cursor


def general_count(config: RLConfig, step: int) -> int:
    """How many prompts of a step (counted from 0) are general: none before the last `last_steps`, or the
    reward models get hacked (R1 section 2.3.4)."""
    preference = config.preference
    if preference is None or step < config.max_steps - preference.last_steps:
        return 0
    return round(preference.general_share * config.prompts_per_step)


def mixed(reasoning: list[Prompt], general: list[Prompt], rng: np.random.Generator) -> list[Prompt]:
    """Both kinds in random order, so that every rank and minibatch gets of both."""
    prompts = reasoning + general
    return [prompts[i] for i in rng.permutation(len(prompts))] if general else prompts
