"""What each rank says of itself while it works: a small file in the run's log folder.

The launching side reads it (launch/watch.py). A tick costs an addition, a change of place a few microseconds.
Both wings import this: no torch here.
"""

import faulthandler
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from r1pipe.core.errors import R1pipeError, disk_is_full
from r1pipe.core.paths import RunFolder
from r1pipe.runs.stopping import Interrupted

WRITE_EVERY_S = 1.0  # while work is done
ALIVE_EVERY_S = 10.0  # while none is: other machines see by it that the process lives
RECORD_BYTES = 512  # of a file: it is written over
TRIES, TRY_AGAIN_S = 5, 0.001  # to read a file that is being written
PIECE = 1 << 26  # bytes of a file that are written between two ticks


@dataclass
class Beat:
    """Where a rank is and how much work it has shown; the content of its file."""

    rank: int
    host: str
    pid: int
    began: float  # of the process, seconds since 1970
    step: int = 0  # that it works on
    place: str = "starting"
    patient: bool = True  # one long piece of work that shows nothing meanwhile: importing, compiling
    waiting: bool = False  # for other ranks, in a collective
    met: int = 0  # collectives entered: of ranks in lockstep, one that is stuck has entered the fewest
    ticks: int = 0  # pieces of work done
    exit_code: int | None = None  # once it has left by itself

    def where(self) -> str:
        """For the user: "update, step 3"."""
        return f"{self.place}, step {self.step}" if self.step else self.place


def read(path: Path) -> Beat | None:
    """None where there is none, or none that can be read."""
    for _ in range(TRIES):
        try:
            return Beat(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):  # in the moment of a change
            time.sleep(TRY_AGAIN_S)
    return None


def read_all(run: RunFolder) -> list[Beat]:
    """Those of a run's ranks, by rank."""
    found = (read(path) for path in run.log.glob(f"{RunFolder.HEARTBEAT}*.json"))
    return sorted((beat for beat in found if beat is not None), key=lambda beat: beat.rank)


def clear(run: RunFolder) -> None:
    """Forget the ranks of an earlier session."""
    for path in run.log.glob(f"{RunFolder.HEARTBEAT}*"):
        path.unlink(missing_ok=True)


class Heart:
    """Writes this process's beat from `start` to `stop`: changes of place at once, ticks once a second."""

    def __init__(self, path: Path, rank: int):
        process = psutil.Process()
        self.path = path
        self.beat = Beat(rank, socket.gethostname(), process.pid, process.create_time())
        self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.show()
        self._thread.start()

    def stop(self, exit_code: int) -> None:
        self._over.set()
        self._thread.join()
        self.beat.exit_code = exit_code
        self.show()
        os.close(self._file)

    def show(self) -> None:
        """What a process wrote stays when it is killed."""
        os.pwrite(self._file, json.dumps(vars(self.beat)).encode().ljust(RECORD_BYTES), 0)

    def _write_on(self) -> None:
        ticks, quiet_s = self.beat.ticks, 0.0
        while not self._over.wait(WRITE_EVERY_S):
            quiet_s += WRITE_EVERY_S
            if self.beat.ticks != ticks or quiet_s >= ALIVE_EVERY_S:
                ticks, quiet_s = self.beat.ticks, 0.0
                self.show()
                with self.path.open("rb+"):  # closing it shows a file system's other machines what is new
                    pass


_heart: Heart | None = None  # of this process; none outside a job


@contextmanager
def beating(run: RunFolder, rank: int) -> Iterator[None]:
    """A heartbeat for the length of a block, in which SIGUSR1 has this process write down what it does."""
    global _heart
    run.log.mkdir(parents=True, exist_ok=True)
    with run.stack(rank).open("a", encoding="utf-8") as file:
        faulthandler.register(signal.SIGUSR1, file)
        _heart = heart = Heart(run.heartbeat(rank), rank)
        heart.start()
        code = 0
        try:
            yield
        except BaseException as error:
            code = exit_code_of(error)
            raise
        finally:
            _heart = None
            heart.stop(code)
            faulthandler.unregister(signal.SIGUSR1)


def exit_code_of(error: BaseException) -> int:
    """The exit code of a rank that this error ends (see r1pipe.train.run.open_run)."""
    if isinstance(error, Interrupted):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, R1pipeError) or disk_is_full(error) else 1


def tick() -> None:
    """A piece of work is done: a micro-batch, a few tokens of a sample, a verdict."""
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
    """A file each piece of which, as it is read, shows work."""
    return io.BufferedReader(_Ticking(path, "rb"))


def to_write(path: Path | str) -> io.BufferedWriter:
    """A file, new or emptied, each piece of which shows work when it is written."""
    return io.BufferedWriter(_Ticking(path, "wb"))


@contextmanager
def limited() -> Iterator[None]:
    """A block that waits for something with a limit of its own, which may be a long one: until then, work."""
    over = threading.Event()

    def ticks() -> None:
        while not over.wait(WRITE_EVERY_S):
            tick()

    thread = threading.Thread(target=ticks, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def at_step(step: int) -> None:
    """Which step is being worked on."""
    if _heart is not None:
        beat = _heart.beat
        beat.step, beat.place, beat.patient, beat.ticks = step, "between phases", False, beat.ticks + 1
        _heart.show()


@contextmanager
def at(place: str, patient: bool = False) -> Iterator[None]:
    """Name what a block does. `patient`: it may take long without a tick."""
    heart = _heart
    if heart is None:
        yield
        return
    beat = heart.beat
    outer = beat.place, beat.patient
    beat.place, beat.patient, beat.ticks = place, patient, beat.ticks + 1
    heart.show()
    try:
        yield
    finally:
        beat.place, beat.patient = outer
        beat.ticks += 1
        heart.show()


@contextmanager
def waiting(for_others: bool = True) -> Iterator[None]:
    """A block in which this rank may wait for the others, if there are any: it is not what holds them up."""
    heart = _heart
    if heart is None or not for_others:
        yield
        tick()
        return
    beat = heart.beat
    beat.met += 1
    beat.waiting = True
    heart.show()
    try:
        yield
    finally:
        beat.waiting = False
        beat.ticks += 1
        heart.show()


@contextmanager
def working() -> Iterator[None]:
    """Within `waiting`: this rank's own work, which the others wait for."""
    heart = _heart
    if heart is None or not heart.beat.waiting:
        yield
        tick()
        return
    beat = heart.beat
    beat.waiting = False
    heart.show()
    try:
        yield
    finally:
        beat.waiting = True
        beat.ticks += 1
        heart.show()
