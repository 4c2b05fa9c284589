"""Which prompts and examples fit a model's context, and drawing enough of them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from r1pipe.chat.template import Chat
from r1pipe.core.types import Prompt
from r1pipe.runs import heartbeat

T = TypeVar("T")

GROWTH = 4  # how many times as much is drawn when too few fit
MOST = 64  # items drawn per item wanted, after which an endless source is given up


def prompt_fits(chat: Chat, context: int, max_tokens: int) -> Callable[[Prompt], bool]:
    """Whether a prompt with a response of `max_tokens` fits a context of `context` tokens."""
    return lambda prompt: len(chat.prompt_tokens(prompt)) <= context - max_tokens


def draw_prompts_that_fit(
    draw: Callable[[int], Sequence[T]], n: int, fits: Callable[[T], bool]
) -> tuple[list[T], int]:
    """Up to n items of `draw(m)` that fit, and how many too long ones were skipped on the way.

    Draws more while too few fit: where fewer than n come back, the source has no more.
    """
    size = n
    while True:
        items = draw(size)
        fitting: list[T] = []
        too_long = 0
        for item in items:
            if len(fitting) == n:
                break
            heartbeat.tick()
            if fits(item):
                fitting.append(item)
            else:
                too_long += 1
        if len(fitting) == n or len(items) < size or size >= MOST * n:
            return fitting, too_long
        size *= GROWTH
