"""The type of a reward."""

from collections.abc import Callable

from r1pipe.records import Completion, Prompt, Score

Reward = Callable[[Prompt, Completion], Score]
