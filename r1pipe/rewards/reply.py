"""What a custom reward replies, a worker process or a server, as a score."""

import math
from numbers import Real
from typing import Any

from r1pipe.core.types import Score, Status

DETAIL = 200  # characters


class Patience:
    """How many verdicts may still be lost by calls that made others wait: a process that had to be ended, a
    server that did not answer. Beyond that nothing more is asked: a minute each could make days."""

    def __init__(self, allowed: float):
        self.allowed = allowed
        self.last: Score | None = None  # the verdict of what was lost last

    def lose(self, count: int, verdict: Score) -> list[Score | None]:
        """Count a lost call; the verdicts that it has instead."""
        self.allowed -= count
        self.last = verdict
        return [verdict] * count

    @property
    def over(self) -> Score | None:
        """What those get that are not asked any more; None while there is patience."""
        return self.last if self.allowed < 0 else None


def score_of(reply: Any) -> Score | None:
    """A number or {"value", "status", "detail"} as a score; None where the reward has no rule for the prompt.

    Raises TypeError or ValueError on anything else, and on a value that is not finite.
    """
    score = reply
    if isinstance(reply, dict):
        if "value" not in reply or reply.keys() - {"value", "status", "detail"}:
            raise TypeError(f"{str(reply)[:DETAIL]!r} has not the keys value, status and detail")
        if reply["value"] is None and reply.get("status", Status.SCORED) == Status.SCORED:
            return None
        score = Score(reply["value"], reply.get("status", Status.SCORED), reply.get("detail", ""))
    if score is None:
        return None
    if not isinstance(score, Score):
        score = Score(score)
    status, detail = Status(score.status), str(score.detail or "")[:DETAIL]
    if status is not Status.SCORED:
        return Score(0.0, status, detail)
    if not isinstance(score.value, Real):
        shown = str(score.value)[:DETAIL]
        raise TypeError(f"{shown!r} is a {type(score.value).__name__}, not a number, a Score or None")
    try:
        value = float(score.value)
    except OverflowError:  # an integer of 400 digits
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    return Score(value, status, detail)
