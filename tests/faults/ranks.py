"""One rank killed or stuck: all end, the rank and its place are named, the run goes on."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from watched import Ended, end_of, ends, start

from faults.outcome import Outcome
from r1pipe.runs import heartbeat

FAKES = {  # what the last rank does -> how the line names it
    "killed": "rank 1 was killed",
    "hangs": "rank 1 stuck in update, step 3",
    "stopped": "rank 1 stuck in update, step 3: its process",
    "two_collectives": "all wait for one another",
}
REAL = {signal.SIGKILL: "was killed", signal.SIGSTOP: "stuck in"}
RL = (
    "stage=grpo",
    "engine.ranks=2",
    "stage.max_steps=12",
    "stage.save_every=1",
    "stage.sampling.max_tokens=32",
)


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    kinds = ["killed", "hangs"] if short else list(FAKES)
    yield outcome(
        "a rank killed, hung or stopped (no training)", [on_fakes(folder / kind, kind) for kind in kinds]
    )
    if not short:
        draw = random.Random(f"ranks/{seed}")
        for number, words in REAL.items():
            ended = [on_real(folder / f"{number.name}-{n}", number, words, draw) for n in range(2)]
            yield outcome(f"{number.name} to a rank that trains", ended)


def outcome(fault: str, found: list[tuple[Ended, str]]) -> Outcome:
    """`found`: how each job ended, and what is wrong with that."""
    wrong = [problem for _, problem in found if problem]
    slowest = max(ended.seconds for ended, _ in found)
    told = wrong[0] if wrong else f"{found[-1][0].line} (at most {slowest:.0f} s)"
    return Outcome(fault, len(found), len(found) - len(wrong), told)


def judged(ended: Ended, words: str) -> str:
    """What is wrong with how a job ended; nothing if it did as it should."""
    if not ended.code:
        return "the exit code is 0"
    named = words in ended.line and "; the same command re" in ended.line and "\n" not in ended.line
    return "" if named else f"told: {ended.line}"


def on_fakes(folder: Path, kind: str) -> tuple[Ended, str]:
    folder.mkdir()
    ended = end_of(kind, folder, 2)
    return ended, judged(ended, FAKES[kind])


def on_real(folder: Path, number: signal.Signals, words: str, draw: random.Random) -> tuple[Ended, str]:
    """A signal to one of two ranks at a moment after their first step; then the same command, to the end."""
    folder.mkdir()
    words_of_job = (*RL, "engine.stuck_after_s=60")
    job = start(folder, *words_of_job)
    ended = ends(job, job.run.metrics.exists, to_rank(job.run, draw.randrange(2), number))
    problem = judged(ended, words)
    if not problem:
        again = ends(start(folder, *words_of_job), lambda: True)
        problem = f"went on with: {again.line}" if again.code else ""
    return ended, problem


def to_rank(run, rank: int, number: signal.Signals) -> Callable[[], None]:
    def act() -> None:
        beat = heartbeat.read(run.heartbeat(rank))
        assert beat is not None
        os.kill(beat.pid, number)

    return act
