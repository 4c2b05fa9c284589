"""Starts the contestants, each in its own process, lets them work in turn and writes down their times."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.config import Case, Job, Setting
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.launchers import without_place
from r1pipe.launch.command import waiting


@dataclass(frozen=True)
class Result:
    """What one contestant did in one case."""

    contestant: str
    case: Case
    model: str
    setting: Setting
    seconds: float  # median over the rounds; of a busy case, beside busy processes
    idle: float  # of a busy case, without them; else the same
    memory: int  # peak, bytes: of the process on a CPU, of the GPU there
    facts: dict[str, Any] = field(default_factory=dict)  # what else it reported in the end


def environment(job: Job, search_path: str) -> dict[str, str]:
    """A contestant's variables: it is no rank. Ours has those that r1pipe launches its jobs with."""
    ours = waiting() if job.contestant.startswith("ours") else {}
    own = {**ours, "PYTHONPATH": search_path, "OMP_NUM_THREADS": str(job.threads)}
    return {**without_place(os.environ), **own}


# Computes until its parent dies.
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100000))"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute all the while."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


class Contestant:
    """A running contestant. Raises EnvironmentProblem, with its log's last line, when it dies."""

    def __init__(self, job: Job, folder: Path, pythons: dict[str, str]):
        self.job = job
        self.log = folder / f"{job.contestant}.log"
        path = folder / f"{job.contestant}.json"
        path.write_text(json.dumps(asdict(job)))
        module = "vllm_peer" if job.contestant == "vllm" else "worker"
        tests, checkout = Path(__file__).resolve().parents[1:3]
        search_path = os.pathsep.join([str(tests), str(checkout)])
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [pythons.get(job.contestant, sys.executable), "-m", f"bench.{module}", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(job, search_path),
            )
        assert self._process.stdin and self._process.stdout
        self._turns, self._answers = self._process.stdin, self._process.stdout

    def answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            self._process.wait()
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"])[-1]
            raise EnvironmentProblem(f"{self.job.contestant} ({self.job.setting}) stopped: {last}")
        return json.loads(line)

    def turn(self) -> float:
        """One repetition: its seconds."""
        with suppress(BrokenPipeError):  # it has died: answer() reports why
            self._turns.write("\n")
            self._turns.flush()
        return float(self.answer()["seconds"])

    def finish(self) -> dict[str, Any]:
        """No more turns: its peak `memory` in bytes, and other facts."""
        self._turns.close()
        facts = self.answer()
        self._process.wait()
        return facts

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._turns, self._answers):
            with suppress(BrokenPipeError):  # a turn that was never read
                pipe.close()


@contextmanager
def running(job: Job, folder: Path, pythons: dict[str, str]) -> Iterator[Contestant]:
    """A contestant that has warmed up, and is stopped in the end."""
    contestant = Contestant(job, folder, pythons)
    try:
        contestant.answer()
        yield contestant
    finally:
        contestant.stop()


def fastest(
    jobs: Sequence[Job], folder: Path, pythons: dict[str, str]
) -> tuple[Setting, dict[str, float | str]]:
    """The setting of the fastest of `jobs`, which differ in nothing else, and each one's seconds or error.

    Raises EnvironmentProblem where none of them ran.
    """
    times: dict[str, float | str] = {}
    best: tuple[float, Setting] | None = None
    problem: EnvironmentProblem | None = None
    for job in jobs:
        try:
            with running(job, folder, pythons) as contestant:
                seconds = contestant.turn()
        except EnvironmentProblem as error:
            problem, times[str(job.setting)] = error, str(error)
            continue
        times[str(job.setting)] = seconds
        if best is None or seconds < best[0]:
            best = seconds, job.setting
    if best is None:
        raise problem or EnvironmentProblem("no setting to try")
    return best[1], times


def contest(jobs: Sequence[Job], rounds: int, folder: Path, pythons: dict[str, str]) -> list[Result]:
    """All jobs of one case, in turn, `rounds` times; of a busy case, each round without and with others."""
    with ExitStack() as stack:
        contestants = [stack.enter_context(running(job, folder, pythons)) for job in jobs]
        idle, beside = [], []
        for _ in range(rounds):
            idle.append([c.turn() for c in contestants])
            if jobs[0].case.busy:
                with busy(jobs[0].threads):
                    beside.append([c.turn() for c in contestants])
        pairs = zip(contestants, zip(*idle, strict=True), zip(*(beside or idle), strict=True), strict=True)
        return [_result(*own) for own in pairs]


def _result(contestant: Contestant, idle: Sequence[float], times: Sequence[float]) -> Result:
    job, facts = contestant.job, contestant.finish()
    memory = int(facts.pop("memory"))
    seconds = median(times), median(idle)
    return Result(job.contestant, job.case, job.model, job.setting, *seconds, memory, facts)
