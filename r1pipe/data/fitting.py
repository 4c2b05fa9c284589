"""What a model's context has room for: the one place where prompts and examples are told to be too long."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from r1pipe.chat.template import Chat
from r1pipe.core.types import Prompt
from r1pipe.runs import heartbeat

T = TypeVar("T")

GROWTH = 4  # how many times as much is drawn when too little of it fitted
MOST = 64  # items drawn for each one wanted, after which an endless source is given up


def prompt_fits(chat: Chat, context: int, max_tokens: int) -> Callable[[Prompt], bool]:
    """Whether a prompt can be answered with `max_tokens` in a context of so many tokens."""
    return lambda prompt: len(chat.prompt_tokens(prompt)) <= context - max_tokens


def draw_prompts_that_fit(
    draw: Callable[[int], Sequence[T]], n: int, fits: Callable[[T], bool]
) -> tuple[list[T], int]:
    """Up to n items that fit, of those that `draw(m)` gives, and how many were passed over on the way.

    Draws more while too few fit: where fewer than n come back, the source has no more.
    """
    asked = n
    while True:
        found = draw(asked)
        fitting, too_long = _first_fitting(found, n, fits)
        if len(fitting) == n or len(found) < asked or asked >= MOST * n:
            return fitting, too_long
        asked *= GROWTH


def _first_fitting(found: Sequence[T], n: int, fits: Callable[[T], bool]) -> tuple[list[T], int]:
    fitting: list[T] = []
    for looked_at, item in enumerate(found):
        if len(fitting) == n:
            return fitting, looked_at - n
        heartbeat.tick()
        if fits(item):
            fitting.append(item)
    return fitting, len(found) - len(fitting)
