"""Jobs over hosts, and what becomes of them when a rank, a host or a cable is taken away."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hosts.network import HEAD, Network, children, wait_until
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints, heartbeat

LIMIT_S = 60.0  # from a loss to the end of all ranks
START_S = 1800.0  # a busy machine takes minutes
STEPS = 16  # more than all trials of one run take
GRPO = ["stage=grpo", f"stage.max_steps={STEPS}", "stage.eval.every=0", "stage.keep=2"]

log = logging.getLogger("hosts")


@dataclass
class Outcome:
    trial: str
    held: bool | None  # None: not tried
    told: str  # what the command said, or what was wrong
    line_s: float | None = None  # from the loss to the line
    end_s: float | None = None  # ... to the end of all ranks on all hosts
    command_s: float | None = None  # ... to the end of the command

    @property
    def seconds(self) -> tuple[float | None, ...]:
        return self.line_s, self.end_s, self.command_s


class Lab:
    """Commands on the first host."""

    common = ("recipe=smoke", "tracking=none", "engine=cpu", "engine.ranks=1", "engine.launcher=pdsh")

    def __init__(self, network: Network, folder: Path):
        self.network, self.folder, self.root = network, folder, folder / "runs"
        self.output = folder / "output.txt"

    def hostfile(self, *names: str) -> str:
        path = self.folder / f"hostfile-{len(names)}"
        path.write_text("".join(f"{name} slots=1\n" for name in names))
        return f"engine.hostfile={path}"

    def variables(self) -> dict[str, str]:
        return self.network.variables()

    def start(self, *words: str) -> "Command":
        return Command(self, [*self.common, *words, f"root={self.root}"])

    def run_folder(self, stage: str) -> RunFolder | None:
        """The newest of a stage."""
        found = sorted(self.root.glob(f"{stage}-s0-*"))
        return RunFolder(found[-1]) if found else None


class Command:
    """`r1pipe run` on the first host."""

    def __init__(self, lab: Lab, words: list[str]):
        self.lab = lab
        line = [sys.executable, "-m", "r1pipe", "run", *words]
        self.before = lab.output.stat().st_size if lab.output.exists() else 0
        with lab.output.open("ab") as output:
            self.process = subprocess.Popen(
                lab.network.hosts[HEAD].inside("env", "-C", str(lab.folder), *line),
                env=lab.variables() | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def send(self, number: int) -> None:
        [pid] = children(self.process.pid)  # nsenter hands no signals on
        os.kill(pid, number)

    def told(self) -> list[str]:
        return self.lab.output.read_bytes()[self.before :].decode().splitlines()

    def wait_for(self, true: Callable[[], object], what: str) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, f"it has ended before {what}: {self.told()[-3:]}"
            return bool(true())

        wait_until(reached, what, START_S)

    def wait(self) -> int:
        code = self.process.wait(START_S)
        return code if code >= 0 else 128 - code


def ranks_of(run: RunFolder) -> list[int]:
    """Pids, as this machine sees them, of the run's ranks on all hosts."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(run.path).encode() in words and any(b"/stages/" in word for word in words):
                found.append(int(folder.name))
    return found


def step_of(run: RunFolder) -> int:
    """The newest checkpoint's; 0 without one."""
    return max(checkpoints.steps(run.checkpoints), default=0)


def rank_on(lab: Lab, run: RunFolder, host: str) -> int:
    """The pid, as this machine sees it, of a host's rank."""

    def network_of(process: int) -> str:
        return os.readlink(f"/proc/{process}/ns/net")

    here = network_of(lab.network.hosts[host].pid)
    [pid] = [pid for pid in ranks_of(run) if network_of(pid) == here]
    return pid


def told_or(held: bool, code: int, said: str) -> str:
    return said if held else f"exit code {code}: {said}"


def lost(
    lab: Lab, name: str, take: Callable[[RunFolder], None], code: int, told: str, words: list[str]
) -> Outcome:
    """Start or resume, take something away once a step is saved, and see what becomes of it."""
    before = lab.run_folder("grpo")
    first = step_of(before) if before else 0
    command = lab.start(*GRPO, *words)
    command.wait_for(lambda: (run := lab.run_folder("grpo")) and step_of(run) > first, "a saved step")
    run = lab.run_folder("grpo")
    assert run is not None and (before is None or run.path == before.path), "it was not resumed"
    beats = {beat.rank: beat.host for beat in heartbeat.read_all(run)}
    log.info("%s: at step %d, %s", name, step_of(run), beats)
    began = time.monotonic()
    take(run)
    wait_until(lambda: run.error.exists() or command.process.poll() is not None, "a line", START_S)
    line_s = time.monotonic() - began
    wait_until(lambda: not ranks_of(run), "the end of all ranks", START_S)
    end_s = time.monotonic() - began
    found, command_s = command.wait(), time.monotonic() - began
    said = command.told()[-1]
    held = found == code and told in said and end_s < LIMIT_S and not ranks_of(run)
    return Outcome(name, held, told_or(held, found, said), line_s, end_s, command_s)


def whole(lab: Lab, name: str, stage: str, words: list[str]) -> Outcome:
    """A command that is to end well."""
    began = time.monotonic()
    command = lab.start(*words)
    code = command.wait()
    run = lab.run_folder(stage)
    done = run is not None and run.record.exists()
    hosts = sorted({beat.host for beat in heartbeat.read_all(run)}) if run else []
    told = f"on {', '.join(hosts)}" if code == 0 else f"exit code {code}: {command.told()[-1:]}"
    return Outcome(name, code == 0 and done, told, command_s=time.monotonic() - began)


def unshared(lab: Lab, words: list[str]) -> Outcome:
    """The second host has another folder in the place of the root."""
    other = lab.network.hosts["h2"]
    other.do("mount", "-t", "tmpfs", "none", str(lab.root))
    began = time.monotonic()
    command = lab.start(*GRPO, *words)
    code = command.wait()
    other.do("umount", str(lab.root))
    said = command.told()[-1]
    held = code == 2 and "h2 does not see" in said and "file system that all machines share" in said
    seconds = time.monotonic() - began
    return Outcome("run folder not shared", held, told_or(held, code, said), command_s=seconds)


def interrupted(lab: Lab, words: list[str]) -> Outcome:
    """The command is killed, another one takes its job over, and gets SIGTERM: all ranks save and leave."""
    killed = lab.start(*GRPO, *words)
    run = lab.run_folder("grpo")
    assert run is not None
    before = step_of(run)
    killed.wait_for(lambda: step_of(run) > before, "a saved step")
    killed.send(signal.SIGKILL)
    killed.wait()
    command = lab.start(*GRPO, *words)
    command.wait_for(lambda: any("this one takes over" in line for line in command.told()), "a new owner")
    before, began = step_of(run), time.monotonic()
    command.send(signal.SIGTERM)
    code = command.wait()
    seconds, said, step = time.monotonic() - began, command.told()[-1], step_of(run)
    held = code == 143 and step >= before and f"resumes from step {step}" in said and not ranks_of(run)
    return Outcome(
        "command killed, then SIGTERM", held, told_or(held, code, said), end_s=seconds, command_s=seconds
    )


def base(lab: Lab) -> None:
    """The weights to start from, on the first host alone, unless they are there."""
    if lab.run_folder("base") is None:
        made = whole(lab, "base", "base", ["stage=base", "engine.launcher=local"])
        assert made.held, made.told


def run(network: Network, folder: Path) -> Iterator[Outcome]:
    """All trials, one after the other: each resumes what the one before it left."""
    lab = Lab(network, folder)
    both, one = [lab.hostfile("h1", "h2")], [lab.hostfile("h1")]
    base(lab)
    yield whole(lab, "cold_start on two hosts", "cold_start", ["stage=cold_start", *both])
    yield from losses(lab, both)
    yield whole(lab, "resumed on one host", "grpo", [*GRPO, *one])


def losses(lab: Lab, both: list[str]) -> Iterator[Outcome]:
    """What is taken away from a run on two hosts."""
    network = lab.network
    yield lost(
        lab,
        "rank killed",
        lambda run: os.kill(rank_on(lab, run, "h2"), signal.SIGKILL),
        137,
        "rank 1 on h2 was killed by SIGKILL",
        both,
    )
    yield lost(lab, "host killed", lambda run: network.hosts["h2"].kill(), 137, "h2 was lost", both)
    network.start("h2")
    yield lost(lab, "cable out", lambda run: network.cut("h2"), 137, "h2 was lost", both)
    network.hosts["h2"].kill()
    network.start("h2")
    yield unshared(lab, both)
    yield interrupted(lab, both)
