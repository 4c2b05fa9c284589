"""Watches a job's ranks while it runs: names one that was killed, or one that is stuck and where.

A rank is stuck when its heartbeat shows no work for `engine.stuck_after_s` and it does not wait for others.
Seconds in which one of its threads waits for a core do not count: on a busy machine work only takes longer.
Process states and stacks are available for ranks of this machine. Of others there are the heartbeat file,
and what their agents say (launch.machines).
"""

import os
import re
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

import r1pipe
from r1pipe.core.paths import RunFolder
from r1pipe.launch.machines import Machines
from r1pipe.runs import checkpoints, heartbeat, processes
from r1pipe.runs.answers import kept_answers
from r1pipe.runs.heartbeat import Beat

CHECK_EVERY_S = 1.0
PATIENCE = 6  # factor on the limit for a start (imports, compilers), which shows no work meanwhile
SUSPECT = 0.8  # share of the limit: ranks that halt because another one did are silent for nearly as long
STACK_S = 30.0  # at most, until the ranks have written their stacks
STACK_PAUSE_S = 0.5  # a stack file that has not grown for this long is complete
SETTLE_S = 3.0  # after a failure, until all machines have reported theirs: ranks elsewhere fail because of it
STUCK_CODE = 1  # exit code
CODE_RANGE = 256  # DeepSpeed's launcher exits with minus a signal's number, which wraps around at this
FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)$', re.MULTILINE)
COLLECTIVE = re.compile(r'^  File ".*(/torch/distributed/|/deepspeed/comm/).*", line \d+ in ', re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    line: str  # for the user
    code: int  # the job's exit code


class Watch:
    def __init__(self, run: RunFolder, ranks: int, stuck_after_s: float, machines: Machines | None = None):
        """`ranks`: how many there are, on all `machines` (None: on this one)."""
        self.run, self.ranks, self.stuck_after_s, self.machines = run, ranks, stuck_after_s, machines
        self.beats: list[Beat] = []
        self.ended: dict[int, int | None] = {}  # rank -> exit code or None, in the order in which they ended
        self._checked_at = self._failed_at = 0.0
        self._failed: list[Beat] = []  # those that may be the first
        self._is_settled = False  # whether it is known which one it is
        # rank -> ((ticks, met), since when, seconds without a core until then)
        self._progress: dict[int, tuple[tuple[int, int], float, float]] = {}

    def check(self) -> Fault | None:
        """A new fault, if any. Call it often: a rank's exit code is lost once its parent has read it."""
        self.beats = heartbeat.read_all(self.run)
        fault = self._find_lost() or self._find_killed(settle_s=SETTLE_S if self.machines else 0.0)
        now = time.monotonic()
        if fault or now - self._checked_at < CHECK_EVERY_S:
            return fault
        self._checked_at = now
        for beat in self.beats:
            progress = beat.ticks, beat.met
            if beat.rank not in self._progress or self._progress[beat.rank][0] != progress:
                self._progress[beat.rank] = progress, now, beat.starved_s
        silent_s = {beat.rank: self._silent_s(beat, now) for beat in self.beats}
        suspects = self._suspects(silent_s)
        return self._describe_stuck(suspects, silent_s) if suspects else None

    def _silent_s(self, beat: Beat, now: float) -> float:
        """Seconds without work in which the rank could have worked."""
        _, since, starved_s = self._progress[beat.rank]
        return max(0.0, now - since - (beat.starved_s - starved_s))

    def final_check(self, launcher_code: int) -> Fault | None:
        """Whether the launcher, which has ended with this exit code, did so because a rank was killed."""
        self.beats = heartbeat.read_all(self.run)
        was_killed = self.machines is None and launcher_code > CODE_RANGE - signal.NSIG
        code = launcher_code - CODE_RANGE if was_killed else None
        return self._find_lost() or self._find_killed(code, settle_s=0.0)

    def exit_codes(self) -> list[int]:
        """Of the ranks that have ended, where known; those on other machines included."""
        observed = {rank: code for rank, code in self.ended.items() if code is not None}
        reported = {beat.rank: beat.exit_code for beat in self.beats if beat.exit_code is not None}
        return list({**observed, **reported, **observed}.values())

    def failed_for_s(self) -> float:
        """Seconds since the first rank failed, for which others may be waiting; 0 if none has."""
        return time.monotonic() - self._failed_at if self._failed_at else 0.0

    def _find_lost(self) -> Fault | None:
        """A machine that is gone, or that cannot start ranks."""
        if self.machines is None:
            return None
        self.machines.look()
        loss = self.machines.lost(self.beats)
        if loss is None:
            return None
        line = f"{self.run.run_id}: {loss.line}; all ranks were ended; {resume_hint(self.run)}"
        return Fault(f"{line}{loss.remedy}", loss.code)

    def _find_killed(self, fallback_code: int | None = None, settle_s: float = 0.0) -> Fault | None:
        """Whether a signal killed the first rank that failed; those that fail after it fail because of it.

        An exit code that the launcher has already read is taken from the rank's heartbeat or, where that has
        none, is `fallback_code`. Of machines that tell theirs at different times, all that come within
        `settle_s` count as first.
        """
        known = self.machines.ended() if self.machines else {}
        ended = [
            heartbeat.read(self.run.heartbeat(beat.rank)) or beat  # it may have written since
            for beat in self.beats
            if beat.rank not in self.ended and self._has_ended(beat, known)
        ]
        codes = {}
        for beat in ended:
            candidates = (known.get(beat.rank), processes.exit_code(beat.pid), beat.exit_code, fallback_code)
            codes[beat.rank] = next((code for code in candidates if code is not None), None)
        self.ended |= codes
        if self._is_settled:
            return None
        self._failed += [beat for beat in ended if codes[beat.rank] != 0]
        if not self._failed:
            return None
        self._failed_at = self._failed_at or time.monotonic()
        self._is_settled = self.failed_for_s() >= settle_s
        return self._describe_killed() if self._is_settled else None

    def _has_ended(self, beat: Beat, known: Mapping[int, int]) -> bool:
        if self.machines is not None:
            return beat.rank in known
        return beat.is_here and not processes.is_alive(beat.pid, beat.began)

    def _describe_killed(self) -> Fault | None:
        codes = self.ended
        killed = [beat for beat in self._failed if beat.exit_code is None and (codes[beat.rank] or -1) < 0]
        if not killed:
            return None
        # gloo's threads abort when another rank is gone
        first = min(killed, key=lambda beat: codes[beat.rank] == -signal.SIGABRT)
        code = codes[first.rank]
        by = f" by {signal.Signals(-code).name}" if code else ""
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        where = f" on {self.machines.name_of(first.rank)}" if self.machines else ""
        line = f"rank {first.rank}{where} was killed{by}{hint} in {first.where()}; all ranks were ended"
        number = -code if code else signal.SIGKILL
        return Fault(f"{self.run.run_id}: {line}; {resume_hint(self.run)}", 128 + number)

    def _suspects(self, silent_s: dict[int, float]) -> list[Beat]:
        """Ranks that may be blocking the job; none while all is well."""

        def share_of_limit(beat: Beat) -> float:
            return silent_s[beat.rank] / (self.stuck_after_s * (PATIENCE if beat.patient else 1))

        alive = [beat for beat in self.beats if beat.rank not in self.ended]
        stopped = [beat for beat in alive if is_stopped(beat)]
        if any(silent_s[beat.rank] > self.stuck_after_s for beat in stopped):
            return stopped
        working = [beat for beat in alive if not beat.waiting]
        if any(share_of_limit(beat) > 1 for beat in working):
            return [beat for beat in working if share_of_limit(beat) > SUSPECT]
        if working or not alive:
            return []
        some_missing = len(self.beats) < self.ranks  # maybe still importing
        limit_s = self.stuck_after_s * (PATIENCE if some_missing else 1)
        return alive if all(silent_s[beat.rank] > limit_s for beat in alive) else []

    def _describe_stuck(self, suspects: list[Beat], silent_s: dict[int, float]) -> Fault:
        stacks = collect_stacks(self.run, [beat for beat in self.beats if beat.is_here])
        reason = f"no sign of work for {max(silent_s[beat.rank] for beat in suspects):.0f} s"
        if is_stopped(suspects[0]):
            reason = f"its process {suspects[0].pid} is stopped (SIGSTOP), {reason}"
        elif all(beat.waiting for beat in suspects):
            reason = f"all wait for one another, {reason}"
            absent = sorted({*range(self.ranks)} - {beat.rank for beat in self.beats})
            if absent:
                reason = f"they wait for {name_ranks(absent)}, which has not begun, {reason}"
        else:  # in lockstep, what blocks the others has entered the fewest collectives
            outside = [beat for beat in suspects if not COLLECTIVE.search(stacks.get(beat.rank, ""))]
            suspects = outside or suspects
            fewest = min(beat.met for beat in suspects)
            suspects = [beat for beat in suspects if beat.met == fewest]
        first = suspects[0]
        where = first.where()
        home = Path(r1pipe.__file__).resolve().parent
        for frame in FRAME.finditer(stacks.get(first.rank, "")):
            if frame["file"].startswith(f"{home}{os.sep}"):  # the innermost line of r1pipe
                file = Path(frame["file"]).relative_to(home.parent)
                where += f" ({file}:{frame['line']} in {frame['name']})"
                break
        ranks = name_ranks(beat.rank for beat in suspects)
        return Fault(
            f"{self.run.run_id}: {ranks} stuck in {where}: {reason}; all ranks were ended "
            f"(stacks: {self.run.stack(first.rank)}); {resume_hint(self.run)}",
            STUCK_CODE,
        )


def resume_hint(run: RunFolder) -> str:
    """What the same command will do, for the end of a message."""
    if run.record.exists():
        return "the same command continues after it"
    steps = checkpoints.steps(run.checkpoints)
    if steps:
        return f"the same command resumes from step {steps[-1]}"
    if kept := kept_answers(run):
        return f"{kept:,} answers are kept, and the same command goes on from there"
    return "the same command restarts it (no checkpoint yet)"


def name_ranks(ranks: Iterable[int]) -> str:
    numbers = list(map(str, ranks))
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"


def is_stopped(beat: Beat) -> bool:
    return beat.is_here and processes.status(beat.pid, beat.began) == psutil.STATUS_STOPPED


def collect_stacks(run: RunFolder, beats: Sequence[Beat]) -> dict[int, str]:
    """What each rank's main thread is doing, innermost call first; a stopped process writes nothing."""

    def sizes_now() -> dict[int, int]:
        paths = {beat.rank: run.stack(beat.rank) for beat in beats}
        return {rank: path.stat().st_size if path.exists() else 0 for rank, path in paths.items()}

    before = sizes_now()
    signalled = set()
    for beat in beats:
        if processes.is_alive(beat.pid, beat.began) and not is_stopped(beat):
            with suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGUSR1)
                signalled.add(beat.rank)
    deadline = time.monotonic() + STACK_S
    previous, sizes = before, before
    while sizes != previous or any(sizes[rank] == before[rank] for rank in signalled):
        if time.monotonic() > deadline:
            break
        time.sleep(STACK_PAUSE_S)
        previous, sizes = sizes, sizes_now()
    stacks = {}
    for rank, size in sizes_now().items():
        if size > before[rank]:
            added = run.stack(rank).read_bytes()[before[rank] :].decode("utf-8", "replace")
            stacks[rank] = added.strip().split("\n\n")[-1]  # the main thread's is the last
    return stacks
