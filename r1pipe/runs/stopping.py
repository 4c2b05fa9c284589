"""How a job is asked to stop, and how its ranks leave together.

The launching side leaves a file in the run folder, which ranks on every machine see; a signal to a rank
itself (Slurm's preemption) does the same. Nothing happens where it arrives: a rank goes on to a point that
all ranks reach, there they agree, save and leave. Both wings import this: no torch here.
"""

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
LOOK_EVERY_S = 0.2  # at the file


class Stopped(Exception):
    """This rank has left its work because it was asked to; the others do not know yet."""


class Interrupted(Exception):
    """All ranks leave together: raised at the same point in each of them."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Agreeing(Protocol):
    """The ranks of a job (r1pipe.train.engine.ranks.Ranks)."""

    def agree_max(self, value: int) -> int: ...


def request(path: Path, number: int, at_once: bool = False) -> None:
    """Ask the ranks of a job to stop, as the signal `number` would."""
    write_text(path, f"{number} {AT_ONCE if at_once else ''}")


_asked = 0  # the number of the signal that asked this process to stop


def asked() -> int:
    """0, or the number of the signal by which this process was asked to stop."""
    return _asked


def agreed(ranks: Agreeing) -> int:
    """At a point that all ranks reach: 0, or the number of the signal that asked one of them to stop."""
    return ranks.agree_max(_asked)


def stop_if_requested(ranks: Agreeing) -> None:
    """At a point that all ranks reach: raises Interrupted in all of them if one was asked to stop."""
    if number := agreed(ranks):
        raise Interrupted(number)


@contextmanager
def leaving_early(ranks: Agreeing) -> Iterator[None]:
    """Work without collectives that a rank may leave by Stopped; at its end the ranks agree.

    Raises Interrupted in all ranks if one was asked to stop.
    """
    with suppress(Stopped):
        yield
    stop_if_requested(ranks)


@contextmanager
def listening(path: Path, grace_s: float) -> Iterator[None]:
    """Take requests to stop, by signal or by the file `path`, for the length of a block.

    A second request ends the process at once, and so does `grace_s` seconds after the first.
    """
    over = threading.Event()
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(handling(_take))
        thread = threading.Thread(target=_look, args=(path, grace_s, over), name="stopping", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            _forget()


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], None], numbers: Iterable[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """Signals go to `handler` for the length of a block of the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def leave(number: int, frame: FrameType | None) -> None:
    """A handler that ends the process in good order."""
    raise SystemExit(128 + number)


def _take(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked:
        os._exit(128 + number)
    _asked = number


def _forget() -> None:
    global _asked
    _asked = 0


def _look(path: Path, grace_s: float, over: threading.Event) -> None:
    """Wait for the file, then for the end of the grace."""
    global _asked
    ends_at = float("inf")
    while not over.wait(LOOK_EVERY_S):
        with suppress(FileNotFoundError):
            number, _, how = path.read_text(encoding="utf-8").partition(" ")
            if how == AT_ONCE:
                os._exit(128 + int(number))
            _asked = _asked or int(number)
        if _asked:
            ends_at = min(ends_at, time.monotonic() + grace_s)
        if time.monotonic() > ends_at:
            os._exit(128 + _asked)
