"""A contestant's side of the talk with the referee: it works when told to, and says how long that took.

Standard library alone, so that a contestant in another environment (vLLM's) can import it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def nothing() -> None:
    """What there is to wait for on a CPU."""


class Turns:
    """Reads turns from stdin and answers on the stdout it was started with; whatever libraries print there
    goes to stderr. `wait_for_device` returns when a GPU has done what it was given."""

    def __init__(self, wait_for_device: Callable[[], None] = nothing) -> None:
        self.wait_for_device = wait_for_device
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = 0.0

    def say(self, **answer: Any) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def begin(self) -> bool:
        """Block until the next turn and start the clock; false when there is none left."""
        if not sys.stdin.readline():
            return False
        self.wait_for_device()
        self._began = time.perf_counter()
        return True

    def end(self) -> None:
        """Stop the clock and tell the referee."""
        self.wait_for_device()
        self.say(seconds=time.perf_counter() - self._began)

    def run(self, work: Callable[[], object]) -> None:
        """One repetition that warms up, then one per turn."""
        began = time.perf_counter()
        work()
        self.wait_for_device()
        self.say(first=time.perf_counter() - began)
        while self.begin():
            work()
            self.end()

    def finish(self, memory: int | None = None, **facts: Any) -> None:
        """The last word: peak memory in bytes, of the process or as the device counted it, and what else."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.say(memory=peak if memory is None else memory, **facts)
