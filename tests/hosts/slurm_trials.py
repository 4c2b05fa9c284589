"""Jobs of Slurm: submitted, followed, let go of, interrupted in each way, and resumed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hosts.network import Network, wait_until
from hosts.scheduler import Slurm
from hosts.trials import START_S, Command, Lab, Outcome, base, rank_on, ranks_of, step_of, told_or, whole
from r1pipe.core.paths import RunFolder
from r1pipe.runs.files import read_json

WORDS = [
    *("engine=slurm", "engine.ranks=1", "engine.threads=1", "engine.accelerator=cpu", "engine.zero_level=0"),
    *("engine.precision=fp32", "engine.recompute=false", "engine.head=model", "engine.slurm.nodes=2"),
    *("engine.slurm.lines=[]", "engine.launcher=slurm", "engine.grace_s=240"),
]
STAGE = ["stage=grpo", "stage.max_steps=40", "stage.eval.every=0", "stage.keep=2"]


class SlurmLab(Lab):
    common = ("recipe=smoke", "tracking=none", *WORDS)

    def __init__(self, network: Network, slurm: Slurm, folder: Path):
        super().__init__(network, folder)
        self.slurm = slurm

    def variables(self) -> dict[str, str]:
        return self.slurm.variables()

    def newest(self) -> RunFolder:
        run = self.run_folder("grpo")
        assert run is not None
        return run

    def job(self) -> int:
        return read_json(self.newest().slurm)["job"]

    def shown(self) -> str:
        return self.slurm.ask("scontrol", "show", "job", str(self.job()))

    def restarts(self) -> int:
        return int(self.shown().partition("Restarts=")[2].split()[0])

    def at_work(self, command: Command | None, first: int = -1) -> RunFolder:
        """The run, once its job has saved another step than `first`."""

        def saved() -> bool:
            assert command is None or command.process.poll() is None, command.told()[-3:]
            run = self.run_folder("grpo")
            return run is not None and step_of(run) > first and bool(ranks_of(run))

        wait_until(saved, "a saved step", START_S)
        return self.newest()


def ended(
    lab: SlurmLab, command: Command, name: str, code: int, told: str, take: Callable[[], None]
) -> Outcome:
    """What becomes of a job after `take`."""
    run, began = lab.newest(), time.monotonic()
    before = step_of(run)
    take()
    wait_until(lambda: run.error.exists() or not ranks_of(run), "an end", START_S)
    line_s = time.monotonic() - began
    wait_until(lambda: not ranks_of(run), "the end of all ranks", START_S)
    end_s = time.monotonic() - began
    found, command_s, said = command.wait(), time.monotonic() - began, command.told()[-1]
    held = found == code and told in said and step_of(run) >= before
    return Outcome(name, held, told_or(held, found, said), line_s, end_s, command_s)


def goes_on(lab: SlurmLab, name: str, take: Callable[[], None]) -> Outcome:
    """Slurm itself takes the job away and starts it again: it saves, and trains on from there."""
    run, restarts, began = lab.newest(), lab.restarts(), time.monotonic()
    before = step_of(run)
    take()
    wait_until(lambda: not ranks_of(run), "the end of all ranks", START_S)
    end_s, saved = time.monotonic() - began, step_of(run)
    wait_until(lambda: "JobState=PENDING" in lab.shown(), "a place in the queue", START_S)
    lab.slurm.ask("scontrol", "update", f"JobId={lab.job()}", "StartTime=now")  # else in two minutes
    lab.at_work(None, saved)
    held = lab.restarts() > restarts and saved >= before
    return Outcome(name, held, f"saved step {saved}, and goes on", end_s=end_s)


def run(network: Network, slurm: Slurm, folder: Path) -> Iterator[Outcome]:
    """All trials, one after the other: each resumes what the one before it left."""
    lab = SlurmLab(network, slurm, folder)
    base(Lab(network, folder))
    yield whole(lab, "cold_start under Slurm", "cold_start", ["stage=cold_start"])
    script = lab.start(*STAGE, "--dry-run")
    assert script.wait() == 0 and "#SBATCH --nodes=2" in script.told(), script.told()
    command = lab.start(*STAGE)
    run = lab.at_work(command)
    yield detached(lab, command)
    command = lab.start(*STAGE)
    wait_until(lambda: any("follows Slurm's job" in line for line in command.told()), "a line", START_S)
    yield goes_on(lab, "preempted", lambda: preempt(slurm))
    yield goes_on(lab, "time limit near", lambda: scancel(slurm, lab, "--batch", "--signal=USR1"))
    yield ended(
        lab,
        command,
        "rank killed under Slurm",
        137,
        "rank 1 on h2 was killed by SIGKILL",
        lambda: os.kill(rank_on(lab, run, "h2"), signal.SIGKILL),
    )
    command = lab.start(*STAGE)
    lab.at_work(command, step_of(run))
    yield ended(lab, command, "scancel", 143, "the same command resumes", lambda: scancel(slurm, lab))


def scancel(slurm: Slurm, lab: SlurmLab, *words: str) -> None:
    slurm.ask("scancel", *words, str(lab.job()))


def preempt(slurm: Slurm) -> None:
    """A job of the partition that goes first, for all nodes and a moment."""
    slurm.ask("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 1")


def detached(lab: SlurmLab, command: Command) -> Outcome:
    """Ctrl-C lets go of the job."""
    began = time.monotonic()
    command.send(signal.SIGINT)
    code, said = command.wait(), command.told()[-1]
    seconds = time.monotonic() - began
    lab.at_work(None, step_of(lab.newest()))
    held = code == 130 and f"Slurm's job {lab.job()} goes on without this command" in said
    return Outcome("let go of", held, told_or(held, code, said), command_s=seconds)
