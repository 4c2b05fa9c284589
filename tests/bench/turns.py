"""A contestant's side of the protocol with the referee, and what every contestant works on.

Standard library alone, so that a contestant in another environment (vLLM's) can import it.
"""

import json
import os
import queue
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PAD, EOS = 0, 1
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # as torch calls them


def rows(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """`count` rows of `length` tokens, none of them PAD or EOS; the same ones in every process."""
    draw = random.Random(0)
    return [[draw.randrange(EOS + 1, vocab_size) for _ in range(length)] for _ in range(count)]


def lengths(count: int, longest: int) -> list[int]:
    """Tokens of `count` completions that end by themselves: from an eighth of `longest` to all of it."""
    draw = random.Random(1)
    return [draw.randint(-(-longest // 8), longest) for _ in range(count)]


def completions(count: int, longest: int, vocab_size: int) -> list[list[int]]:
    """The same completions in every process, without PAD and EOS."""
    draw = random.Random(2)
    return [[draw.randrange(EOS + 1, vocab_size) for _ in range(n)] for n in lengths(count, longest)]


def nothing() -> None:
    """What there is to wait for on a CPU."""


class Turns:
    """Reads turns from stdin and answers on the stdout it was started with; whatever libraries print there
    goes to stderr. `wait_for_device` returns when a GPU has finished its work.

    The referee closes stdin only between turns. If stdin ends during one, the referee has been killed, and
    this process exits at once.
    """

    def __init__(self, wait_for_device: Callable[[], None] = nothing) -> None:
        self.wait_for_device = wait_for_device
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = time.perf_counter()
        self._working = True  # the warm-up, with its imports, is a turn too
        self._turns: queue.Queue[bool] = queue.Queue()
        threading.Thread(target=self._read_turns, daemon=True).start()

    def _read_turns(self) -> None:
        while sys.stdin.readline():
            self._working = True
            self._turns.put(True)
        if self._working:
            os._exit(1)
        self._turns.put(False)

    def say(self, **answer: Any) -> None:
        self._working = False
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def begin(self) -> bool:
        """Wait for the next turn and start the clock; false when there are no more turns."""
        if not self._turns.get():
            return False
        self.wait_for_device()
        self._began = time.perf_counter()
        return True

    def end(self) -> None:
        """Stop the clock and report the seconds to the referee."""
        self.wait_for_device()
        self.say(seconds=time.perf_counter() - self._began)

    def run(self, work: Callable[[], object]) -> None:
        """One repetition that warms up, then one per turn."""
        work()
        self.warm()
        while self.begin():
            work()
            self.end()

    def warm(self) -> None:
        """Tell the referee that the warm-up is done."""
        self.wait_for_device()
        self.say(warm=True)

    def finish(self, memory: int | None = None, **facts: Any) -> None:
        """The last answer: peak memory in bytes (by default the process's own), and other facts."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.say(memory=peak if memory is None else memory, **facts)
