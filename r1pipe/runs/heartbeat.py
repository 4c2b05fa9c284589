"""A rank's heartbeat: a small file in the run's log folder that shows where the rank is and that it works.

launch/watch.py reads it. A tick costs an addition, a change of place a few microseconds.
"""

import faulthandler
import io
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from r1pipe.core.errors import R1pipeError, disk_is_full
from r1pipe.core.paths import RunFolder
from r1pipe.runs import processes
from r1pipe.runs.stopping import Interrupted, repeating

WRITE_EVERY_S = 1.0  # while work is done
ALIVE_EVERY_S = 10.0  # while none is: shows other machines that the process is alive
STARVED = 0.1  # share of a second without a core that is shown at once
RECORD_BYTES = 512  # fixed length: the file is overwritten in place
TRIES, TRY_AGAIN_S = 5, 0.001  # a read may meet a write
PIECE = 1 << 26  # bytes written between two ticks


@dataclass
class Beat:
    """The content of a heartbeat file."""

    rank: int
    host: str
    pid: int
    began: float  # start of the process, seconds since 1970
    step: int = 0  # 0: before the first one
    place: str = "starting"
    patient: bool = True  # in work that may take long without a tick: importing, compiling
    waiting: bool = False  # for other ranks, in a collective
    met: int = 0  # collectives entered; the rank that is stuck has entered the fewest
    ticks: int = 0  # pieces of work done
    starved_s: float = 0.0  # of the seconds without a tick, those in which a thread waited for a core
    exit_code: int | None = None  # set when the rank leaves by itself

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def where(self) -> str:
        """`update, step 3`"""
        return f"{self.place}, step {self.step}" if self.step else self.place


def read(path: Path) -> Beat | None:
    """A heartbeat; None if the file is missing or cannot be parsed."""
    for _ in range(TRIES):
        try:
            return Beat(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):  # it is being written
            time.sleep(TRY_AGAIN_S)
    return None


def read_all(run: RunFolder) -> list[Beat]:
    """The heartbeats of a run's ranks, by rank."""
    beats = (read(path) for path in run.log.glob(f"{RunFolder.HEARTBEAT}*.json"))
    return sorted((beat for beat in beats if beat is not None), key=lambda beat: beat.rank)


class Heart:
    """Writes this process's heartbeat: changes of place at once, ticks once a second."""

    def __init__(self, path: Path, rank: int):
        process = psutil.Process()
        self.path = path
        self.beat = Beat(rank, socket.gethostname(), process.pid, process.create_time())
        self.file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        self._ticks, self._quiet_s = 0, 0.0
        self._delays: dict[int, float] = {}  # of the threads, since the last tick

    def show(self) -> None:
        os.pwrite(self.file, json.dumps(vars(self.beat)).encode().ljust(RECORD_BYTES), 0)

    def show_ticks(self) -> None:
        """To be called every WRITE_EVERY_S seconds."""
        self._quiet_s += WRITE_EVERY_S
        has_ticked = self.beat.ticks != self._ticks
        starved_s = 0.0 if has_ticked else self._waited()
        self.beat.starved_s += starved_s
        if has_ticked:
            self._delays = {}
        if has_ticked or starved_s > STARVED * WRITE_EVERY_S or self._quiet_s >= ALIVE_EVERY_S:
            self._ticks, self._quiet_s = self.beat.ticks, 0.0
            self.show()
            with self.path.open("rb+"):  # on NFS, closing a file shows its content to other machines
                pass

    def _waited(self) -> float:
        """Seconds that the thread that waited longest for a core has waited since the last call; 0 at the
        first one after a tick."""
        before, self._delays = self._delays, processes.delays()
        return max(
            (s - before[thread] for thread, s in self._delays.items() if thread in before), default=0.0
        )


_heart: Heart | None = None  # None outside a job


@contextmanager
def beating(run: RunFolder, rank: int) -> Iterator[None]:
    """Keep a heartbeat for the length of a block; SIGUSR1 then writes the stack traces to the log folder.

    At the end it shows the exit code that r1pipe.train.run.open_run leaves with.
    """
    global _heart
    run.log.mkdir(parents=True, exist_ok=True)
    with run.stack(rank).open("a", encoding="utf-8") as file:
        faulthandler.register(signal.SIGUSR1, file)
        _heart = heart = Heart(run.heartbeat(rank), rank)
        heart.show()
        code = 0
        try:
            with repeating(heart.show_ticks, WRITE_EVERY_S, "heartbeat"):
                yield
        except BaseException as error:
            code = 2 if isinstance(error, R1pipeError) or disk_is_full(error) else 1
            if isinstance(error, Interrupted):
                code = error.exit_code
            elif isinstance(error, SystemExit) and isinstance(error.code, int):
                code = error.code
            raise
        finally:
            _heart = None
            heart.beat.exit_code = code
            heart.show()
            os.close(heart.file)
            faulthandler.unregister(signal.SIGUSR1)


def tick() -> None:
    """Show progress: a micro-batch, a few tokens of a sample, a score."""
    if _heart is not None:
        _heart.beat.ticks += 1


class _Ticking(io.FileIO):
    def readinto(self, buffer: Any) -> int | None:
        tick()
        return super().readinto(buffer)

    def write(self, data: Any) -> int:
        tick()
        return super().write(memoryview(data)[:PIECE])


def to_read(path: Path | str) -> io.BufferedReader:
    """Open a file whose reads tick."""
    return io.BufferedReader(_Ticking(path, "rb"))


def to_write(path: Path | str) -> io.BufferedWriter:
    """Create or truncate a file whose writes tick."""
    return io.BufferedWriter(_Ticking(path, "wb"))


def limited() -> AbstractContextManager[None]:
    """Tick throughout a block that waits for something with its own time limit."""
    return repeating(tick, WRITE_EVERY_S, "ticks")


def at_step(step: int) -> None:
    if _heart is not None:
        beat = _heart.beat
        beat.step, beat.place, beat.patient, beat.ticks = step, "between phases", False, beat.ticks + 1
        _heart.show()


@contextmanager
def at(place: str, patient: bool = False) -> Iterator[None]:
    """Name what a block does. `patient`: it may take long without a tick."""
    tick()
    with _changed(place=place, patient=patient):
        yield


@contextmanager
def waiting(for_others: bool = True) -> Iterator[None]:
    """A block in which this rank may wait for other ranks, if there are any: it is not the one stuck."""
    if not for_others:
        yield
        tick()
        return
    if _heart is not None:
        _heart.beat.met += 1
    with _changed(waiting=True):
        yield


@contextmanager
def working() -> Iterator[None]:
    """Within `waiting`: this rank's own work, which the others wait for."""
    with _changed(waiting=False):
        yield


@contextmanager
def _changed(**values: Any) -> Iterator[None]:
    """Change fields of the beat for the length of a block; the end of the block is a tick."""
    heart = _heart
    if heart is None:
        yield
        return
    fields = vars(heart.beat)
    before = {name: fields[name] for name in values}
    fields.update(values)
    heart.show()
    try:
        yield
    finally:
        fields.update(before, ticks=fields["ticks"] + 1)
        heart.show()
