"""Starts the contestants, each in its own process, lets them work in turn and writes down their times."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

from r1pipe.bench.config import Case, Job, Setting
from r1pipe.core.errors import EnvironmentProblem


@dataclass(frozen=True)
class Result:
    """What one contestant did in one case."""

    contestant: str
    case: Case
    model: str
    setting: Setting
    seconds: float  # median over the rounds
    memory: int  # peak, bytes: of the process on a CPU, of the GPU there
    told: dict[str, Any] = field(default_factory=dict)  # what else it said in the end


class Contestant:
    """A running contestant. Raises EnvironmentProblem, with its log's last line, when it dies."""

    def __init__(self, job: Job, folder: Path, pythons: dict[str, str]):
        self.job = job
        self.log = folder / f"{job.contestant}.log"
        path = folder / f"{job.contestant}.json"
        path.write_text(json.dumps(job.to_mapping()))
        module = "vllm_peer" if job.contestant == "vllm" else "worker"
        python = pythons.get(job.contestant, sys.executable)
        here = str(Path(__file__).resolve().parents[2])
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"r1pipe.bench.{module}", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": str(job.threads)},
            )
        self._hear()

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def _hear(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            self._process.wait()
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise EnvironmentProblem(f"{self.job.contestant} ({self.job.setting}) stopped: {last}")
        return json.loads(line)

    def turn(self) -> float:
        """One repetition: its seconds."""
        pipe = self._pipe(self._process.stdin)
        try:
            pipe.write("\n")
            pipe.flush()
        except BrokenPipeError:
            pass  # it has died: _hear says of what
        return float(self._hear()["seconds"])

    def finish(self) -> dict[str, Any]:
        """No more turns: its peak `memory` in bytes, and what else it says."""
        self._pipe(self._process.stdin).close()
        told = self._hear()
        self._process.wait()
        return told

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            self._pipe(pipe).close()


@contextmanager
def running(job: Job, folder: Path, pythons: dict[str, str]) -> Iterator[Contestant]:
    """A contestant that has warmed up, and is stopped in the end."""
    contestant = Contestant(job, folder, pythons)
    try:
        yield contestant
    finally:
        contestant.stop()


def fastest(
    jobs: Sequence[Job], folder: Path, pythons: dict[str, str]
) -> tuple[Setting, dict[str, float | str]]:
    """The setting of the quickest of `jobs`, which differ in nothing else, and what each took (or said).

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
    """All jobs of one case, in turn, `rounds` times."""
    with ExitStack() as stack:
        contestants = [stack.enter_context(running(job, folder, pythons)) for job in jobs]
        times = [[c.turn() for c in contestants] for _ in range(rounds)]
        return [_result(c, own) for c, own in zip(contestants, zip(*times, strict=True), strict=True)]


def _result(contestant: Contestant, times: Sequence[float]) -> Result:
    job, told = contestant.job, contestant.finish()
    memory = int(told.pop("memory"))
    return Result(job.contestant, job.case, job.model.name, job.setting, median(times), memory, told)
