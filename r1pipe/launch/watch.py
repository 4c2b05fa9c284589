"""Looks after a job's ranks while it runs: names one that was killed, or one that is stuck and where.

A rank is stuck when its heartbeat shows no work for `engine.stuck_after_s` and it does not wait for others.
Only ranks of this machine are asked for more (their state, their stacks); the others' files must do.
"""

import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

import r1pipe
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints, heartbeat, processes
from r1pipe.runs.heartbeat import Beat

LOOK_EVERY_S = 1.0
PATIENCE = 6  # times longer may a start take (imports, compilers), which shows nothing meanwhile
SUSPECT = 0.8  # of the limit: what comes to a halt because another rank did is silent for nearly as long
STACK_S = 30.0  # at most, for the stacks that ranks were asked for
STACK_PAUSE_S = 0.5  # a file that has not grown for so long is whole
STUCK_CODE = 1  # exit code
FORGOTTEN = 256  # DeepSpeed's launcher ends with minus a signal's number, which the system takes modulo this
FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)$', re.MULTILINE)
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")


@dataclass(frozen=True)
class Fault:
    """Why a job is ended."""

    line: str  # for the user
    code: int  # the job's exit code


class Watch:
    """What is known of one job's ranks."""

    def __init__(self, run: RunFolder, ranks: int | None, stuck_after_s: float):
        """`ranks`: how many there are; None where they are on several machines."""
        self.run, self.ranks, self.stuck_after_s = run, ranks, stuck_after_s
        self.beats: list[Beat] = []
        self._looked = self._failed_at = 0.0
        self._shown: dict[int, tuple[tuple[int, int], float]] = {}  # rank -> ((ticks, met), since when)
        self.ended: dict[int, int | None] = {}  # rank -> exit code, where known; in the order of their ends

    def look(self) -> Fault | None:
        """To be called often, so that a rank's end is seen before its parent has asked for it; a fault that
        has come up."""
        self.beats = heartbeat.read_all(self.run)
        fault = self._killed()
        now = time.monotonic()
        if fault or now - self._looked < LOOK_EVERY_S:
            return fault
        self._looked = now
        for beat in self.beats:
            shown = beat.ticks, beat.met
            if beat.rank not in self._shown or self._shown[beat.rank][0] != shown:
                self._shown[beat.rank] = shown, now
        late = self._late(now)
        return self._stuck(late, now) if late else None

    def last_look(self, launcher: int) -> Fault | None:
        """Once the launcher has ended, with this exit code: whether it was because a rank was killed."""
        self.beats = heartbeat.read_all(self.run)
        return self._killed(launcher - FORGOTTEN if launcher > FORGOTTEN - signal.NSIG else None)

    def exit_codes(self) -> list[int]:
        """Of the ranks that have ended, where known; those on other machines included."""
        known = {rank: code for rank, code in self.ended.items() if code is not None}
        left = {beat.rank: beat.exit_code for beat in self.beats if beat.exit_code is not None}
        return list({**known, **left, **known}.values())

    def failed_for_s(self) -> float:
        """Seconds since a rank failed while others go on, maybe waiting for it; 0 while all is well."""
        return time.monotonic() - self._failed_at if self._failed_at else 0.0

    def _mine(self) -> list[Beat]:
        """Of the ranks on this machine."""
        return [beat for beat in self.beats if beat.host == socket.gethostname()]

    def _killed(self, else_code: int | None = None) -> Fault | None:
        """What a signal did to the first rank that failed; those that fail after it fail because of it.

        The launcher reaps its ranks: an exit code that the system has forgotten by then is the one that the
        rank left in its heartbeat or, where it left none, `else_code`.
        """
        new = [
            heartbeat.read(self.run.heartbeat(beat.rank)) or beat  # what it wrote last
            for beat in self._mine()
            if beat.rank not in self.ended and not processes.is_alive(beat.pid, beat.began)
        ]
        codes = {}
        for beat in new:
            known = (processes.exit_code(beat.pid), beat.exit_code, else_code)
            codes[beat.rank] = next((code for code in known if code is not None), None)
        self.ended |= codes
        failed = [beat for beat in new if codes[beat.rank] != 0]
        if self._failed_at or not failed:
            return None
        self._failed_at = time.monotonic()
        killed = [beat for beat in failed if beat.exit_code is None and (codes[beat.rank] or -1) < 0]
        # gloo's threads abort when another rank is gone
        killed.sort(key=lambda beat: codes[beat.rank] == -signal.SIGABRT)
        return self._killed_by(killed[0], codes[killed[0].rank]) if killed else None

    def _killed_by(self, beat: Beat, code: int | None) -> Fault:
        """`code`: None where DeepSpeed's launcher was quicker to ask for it."""
        by = f" by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
        hint = " (out of memory?)" if by.endswith("SIGKILL") else ""
        line = f"rank {beat.rank} was killed{by}{hint} in {beat.where()}; all ranks were ended"
        number = -code if by and code else signal.SIGKILL
        return Fault(f"{self.run.run_id}: {line}; {goes_on(self.run)}", 128 + number)

    def _silent_s(self, beat: Beat, now: float) -> float:
        return now - self._shown[beat.rank][1]

    def _limit_s(self, beat: Beat) -> float:
        return self.stuck_after_s * (PATIENCE if beat.patient else 1)

    def _late(self, now: float) -> list[Beat]:
        """Ranks that may be what holds the job up; none while all is well."""
        living = [beat for beat in self.beats if beat.rank not in self.ended]
        stopped = [beat for beat in living if self._is_stopped(beat)]
        if any(self._silent_s(beat, now) > self.stuck_after_s for beat in stopped):
            return stopped
        working = [beat for beat in living if not beat.waiting]
        if any(self._silent_s(beat, now) > self._limit_s(beat) for beat in working):
            return [beat for beat in working if self._silent_s(beat, now) > SUSPECT * self._limit_s(beat)]
        if working or not living:
            return []
        missing = self.ranks is not None and len(self.beats) < self.ranks  # still importing, maybe
        limit_s = self.stuck_after_s * (PATIENCE if missing else 1)
        return living if all(self._silent_s(beat, now) > limit_s for beat in living) else []

    def _is_stopped(self, beat: Beat) -> bool:
        return (
            beat.host == socket.gethostname()
            and processes.status(beat.pid, beat.began) == psutil.STATUS_STOPPED
        )

    def _stuck(self, late: Sequence[Beat], now: float) -> Fault:
        stacks = ask_for_stacks(self.run, self._mine())
        silent_s = max(self._silent_s(beat, now) for beat in late)
        why = f"no sign of work for {silent_s:.0f} s"
        if self._is_stopped(late[0]):
            why = f"its process {late[0].pid} is stopped (SIGSTOP), {why}"
        elif all(beat.waiting for beat in late):
            why = f"all wait for one another, {why}"
            absent = sorted({*range(self.ranks or 0)} - {beat.rank for beat in self.beats})
            if absent:
                why = f"they wait for {ranks_of(absent)}, which has not begun, {why}"
        else:
            late = least_advanced(
                [beat for beat in late if not in_collective(stacks.get(beat.rank, ""))] or late
            )
        where = late[0].where() + place_in(stacks.get(late[0].rank, ""))
        line = f"{ranks_of(beat.rank for beat in late)} stuck in {where}: {why}; all ranks were ended"
        return Fault(
            f"{self.run.run_id}: {line} (stacks: {self.run.stack(late[0].rank)}); {goes_on(self.run)}",
            STUCK_CODE,
        )


def goes_on(run: RunFolder) -> str:
    """What the same command will do, for the end of a line."""
    if run.record.exists():
        return "the same command goes on after it"
    steps = checkpoints.steps(run.checkpoints)
    return "the same command goes on " + (
        f"from step {steps[-1]}" if steps else "with it (no checkpoint yet)"
    )


def ranks_of(ranks: Iterable[int]) -> str:
    numbers = list(map(str, ranks))
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"


def least_advanced(beats: Sequence[Beat]) -> list[Beat]:
    """In lockstep, the ranks that have entered the fewest collectives."""
    fewest = min(beat.met for beat in beats)
    return [beat for beat in beats if beat.met == fewest]


def ask_for_stacks(run: RunFolder, beats: Sequence[Beat]) -> dict[int, str]:
    """What each rank's main thread is doing, innermost call first; a stopped process writes nothing."""
    before = {beat.rank: size_of(run.stack(beat.rank)) for beat in beats}
    asked = set()
    for beat in beats:
        state = processes.status(beat.pid, beat.began)
        if state not in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED):
            with suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGUSR1)
                asked.add(beat.rank)
    ends_at = time.monotonic() + STACK_S
    earlier, sizes = before, before
    while time.monotonic() < ends_at and (sizes != earlier or any(sizes[r] == before[r] for r in asked)):
        time.sleep(STACK_PAUSE_S)
        earlier, sizes = sizes, {rank: size_of(run.stack(rank)) for rank in before}
    found = {}
    for rank, size in before.items():
        if size_of(run.stack(rank)) > size:
            with run.stack(rank).open("rb") as file:
                file.seek(size)
                found[rank] = file.read().decode("utf-8", "replace").strip().split("\n\n")[-1]
    return found


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def in_collective(stack: str) -> bool:
    return any(name in frame["file"] for frame in FRAME.finditer(stack) for name in COLLECTIVES)


def place_in(stack: str) -> str:
    """The innermost line of r1pipe in a stack: " (r1pipe/train/rl/loop.py:88 in score)"."""
    home = Path(r1pipe.__file__).resolve().parent
    for frame in FRAME.finditer(stack):
        if frame["file"].startswith(f"{home}{os.sep}"):
            return f" ({Path(frame['file']).relative_to(home.parent)}:{frame['line']} in {frame['name']})"
    return ""
