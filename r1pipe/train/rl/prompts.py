"""The prompts of each step: streams whose only state is a cursor."""

from collections.abc import Callable
from functools import lru_cache, partial

from r1pipe.config import RLConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Prompt
from r1pipe.data.source import prompt_fits
from r1pipe.train.run import Run

POOL = 16_384  # prompts drawn from the source at once
Cursors = tuple[int, int]  # of the reasoning and of the general prompts
PATIENCE = 1_000  # prompts in a row that do not fit before the search ends


class PromptStream:
    """Pools of a source's prompts, each drawn with its own seed: shuffled epochs of a file, or new problems
    of an endless source."""

    def __init__(self, draw: Callable[[int], list[Prompt]], fits: Callable[[Prompt], bool], name: str):
        """`draw` returns pool 0, 1 ..., all of one length. Raises DataError where the data has no prompts."""
        self._pool = lru_cache(maxsize=2)(draw)
        self._fits, self._name = fits, name
        self._length = len(self._pool(0))
        if not self._length:
            raise DataError(f"the data has no {name}; choose another with data=")

    def take(self, cursor: int, n: int) -> tuple[list[Prompt], int]:
        """The next n prompts from `cursor`, and the cursor after them. Raises DataError where none fits."""
        taken: list[Prompt] = []
        skipped = 0
        while len(taken) < n:
            prompt = self._pool(cursor // self._length)[cursor % self._length]
            cursor += 1
            if self._fits(prompt):
                taken.append(prompt)
                skipped = 0
            elif (skipped := skipped + 1) > max(self._length, PATIENCE):
                raise DataError(
                    f"none of {skipped:,} {self._name} leaves room for stage.sampling.max_tokens in "
                    "model.max_position_embeddings; lower the first or take a model with a longer context"
                )
        return taken, cursor


def general_count(config: RLConfig, step: int) -> int:
    """How many prompts of a step (counted from 0) are general: none before the last `last_steps`, so that the
    policy does not hack the reward models (R1 section 2.3.4)."""
    preference = config.preference
    if preference is None or step < config.max_steps - preference.last_steps:
        return 0
    return round(preference.general_share * config.prompts_per_step)


class StepPrompts:
    """The prompts of a stage's rollout batches: a function of the step and of two cursors."""

    def __init__(self, run: Run[RLConfig]):
        self.run, self.config = run, run.stage
        self.reasoning = self._stream(run.data.prompts, "reasoning prompts")
        self.general: PromptStream | None = None
        if preference := run.stage.preference:
            draw = partial(run.data.general_prompts, kinds=preference.general_kinds)
            self.general = self._stream(draw, "general prompts")

    def take(self, step: int, cursors: Cursors) -> tuple[list[Prompt], Cursors]:
        """A rollout batch's prompts for a step (counted from 0), of all ranks, and the cursors after them."""
        n = self.config.prompts_per_step
        n_general = general_count(self.config, step)
        reasoning, reasoning_cursor = self.reasoning.take(cursors[0], n - n_general)
        general: list[Prompt] = []
        general_cursor = cursors[1]
        if self.general:
            general, general_cursor = self.general.take(cursors[1], n_general)
        prompts = reasoning + general
        if general:  # in random order, so that every rank and minibatch gets some of each
            prompts = [prompts[i] for i in self.run.rng("order", step).permutation(n)]
        return prompts, (reasoning_cursor, general_cursor)

    def _stream(self, draw: Callable[[str, int, int], list[Prompt]], name: str) -> PromptStream:
        config = self.config
        size = min(config.max_steps * config.prompts_per_step, POOL)
        context = self.run.config.model.max_position_embeddings
        fits = prompt_fits(self.run.chat, context, config.sampling.max_tokens)
        return PromptStream(lambda pool: draw("train", size, self.run.seed(name, pool)), fits, name)
