"""The type of a reward."""

from collections.abc import Callable

from r1pipe.core.types import Completion, Prompt, Score

Reward = Callable[[Prompt, Completion], Score]
