"""Requests to stop a job, and how its ranks leave together.

The launcher writes a file into the run folder, which ranks on every machine see; a signal to a rank (Slurm's
preemption) does the same. A rank continues to a point that all ranks reach; there they agree, save and leave.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

from r1pipe.runs.files import write_text

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODES = tuple(128 + number for number in SIGNALS)
AT_ONCE = "at once"
POLL_S = 0.2


class Stopped(Exception):
    """This rank stopped its work on request; the others do not know yet."""


class Interrupted(Exception):
    """All ranks leave together: raised at the same point in each of them."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Agreeing(Protocol):
    """The ranks of a job (r1pipe.train.engine.ranks.Ranks)."""

    def agree_max(self, value: int) -> int: ...


def request(path: Path, number: int, at_once: bool = False) -> None:
    """Request that a job's ranks stop, as the signal `number` would."""
    write_text(path, f"{number} {AT_ONCE if at_once else ''}")


def is_at_once(path: Path) -> bool:
    """Whether there is a request to stop at once. Raises OSError where the file cannot be read."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").endswith(f" {AT_ONCE}")
    return False


_requested = 0


def requested() -> int:
    """The signal number of a request to stop this process; 0 without one."""
    return _requested


def agreed(ranks: Agreeing) -> int:
    """At a point that all ranks reach: the signal number of a request to any of them; 0 without one."""
    return ranks.agree_max(_requested)


def stop_if_requested(ranks: Agreeing) -> None:
    """At a point that all ranks reach: raises Interrupted in all of them after a request to any."""
    if number := agreed(ranks):
        raise Interrupted(number)


@contextmanager
def leaving_early(ranks: Agreeing) -> Iterator[None]:
    """A block without collectives that a rank may leave with Stopped.

    Raises Interrupted in all ranks at its end after a request to any.
    """
    with suppress(Stopped):
        yield
    stop_if_requested(ranks)


@contextmanager
def listening(path: Path, grace_s: float) -> Iterator[None]:
    """Accept requests to stop, by signal or by the file `path`, for the length of a block.

    The process ends at once on a second signal, or `grace_s` seconds after the first request.
    """
    global _requested
    ends_at = math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:
        global _requested
        if _requested:
            os._exit(128 + number)
        _requested = number

    def poll() -> None:
        global _requested
        nonlocal ends_at
        with suppress(FileNotFoundError):
            number, _, how = path.read_text(encoding="utf-8").partition(" ")
            if how == AT_ONCE:
                os._exit(128 + int(number))
            _requested = _requested or int(number)
        if _requested:
            ends_at = min(ends_at, time.monotonic() + grace_s)
        if time.monotonic() > ends_at:
            os._exit(128 + _requested)

    try:
        with ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(handling(on_signal))
            stack.enter_context(repeating(poll, POLL_S, "stopping"))
            yield
    finally:
        _requested = 0


@contextmanager
def repeating(work: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Call `work` in a thread, every so many seconds, for the length of a block."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], None], numbers: Iterable[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """Handle signals with `handler` for the length of a block of the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def leave(number: int, frame: FrameType | None) -> None:
    """A handler that raises SystemExit."""
    raise SystemExit(128 + number)
