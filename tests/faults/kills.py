"""Kills at random moments over the laptop pipeline in small, each followed by the same command again.

A walk is one reproduction with several kills; what it ends with is compared with a walk that nothing
interrupted: weights, state for resume, metrics, rollouts, samples, evaluations and the final table. A kill
takes the command, the launcher and all ranks at once. A third of them come at a moment by the clock, the
others at a call of a named point. Kill N of a seed is the same whatever the walk: `--only kills --seed 3
--kill 17` tries it alone.
"""

import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from faults.forks import run_job
from faults.outcome import Outcome
from faults.points import ENDING, JOB, LAUNCHING, TRAINING
from faults.same import finished, pipelines

LANDED = 60  # kills that a whole run lands at least
PER_WALK = 16
BY_TIME = 1 / 3  # share of the kills that come by the clock
LIMIT_S = 1800  # for one attempt
POLL_S = 0.02
INSIDE, AFTER = "inside a stage", "after its end"
LATE_S = 2.0  # after a stage has ended: the points that come with its end have been told by then
WORDS = [
    *("recipe=smoke", "engine.ranks=2", "stage.max_steps=4", "stage.save_every=2", "tracking=none"),
    "engine.async_save=true",  # the matrix has both
]
ONE_STAGE = ["stage=cold_start", "recipe=smoke", "engine.ranks=1", "stage.save_every=1", "tracking=none"]
TESTS = Path(__file__).parents[1]

log = logging.getLogger("faults")


@dataclass(frozen=True)
class Kill:
    """The nth call of a point in a stage's process or, without a point, a share of the stage's seconds."""

    number: int
    stage: str
    point: str | None
    nth: int = 1
    share: float = 0.0

    def __str__(self) -> str:
        when = f"{self.point}, call {self.nth}" if self.point else f"after {self.share:.0%} of its time"
        return f"kill {self.number}: {self.stage}, {when}"


@dataclass(frozen=True)
class Reference:
    """A walk that nothing interrupted."""

    root: Path
    seconds: dict[str, float]  # stage -> how long its job took
    calls: dict[str, Counter[str]]  # stage -> the points that the rank to be killed came by

    @property
    def stages(self) -> list[str]:
        return [*self.seconds]


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    """A row for each walk, until enough kills have landed. The short form is one stage with one kill."""
    if short:
        command = ["run", *ONE_STAGE]
        reference = forked(folder / "whole", command)
        yield walk(
            folder / "walk", command, reference, [Kill(0, "cold_start", "manifest written, name not", 2)]
        )
        return
    command = ["reproduce", *WORDS]
    reference = uninterrupted(folder, command)
    landed = number = 0
    while landed < LANDED:
        kills = [drawn(seed, n, reference) for n in range(number, number + PER_WALK)]
        outcome = walk(folder / f"walk-{number}", command, reference, kills)
        number, landed = number + PER_WALK, landed + outcome.tried
        yield outcome


def run_one(folder: Path, seed: int, number: int) -> Iterator[Outcome]:
    """One kill of a seed, alone in its walk."""
    command = ["reproduce", *WORDS]
    reference = uninterrupted(folder, command)
    yield walk(folder / "walk", command, reference, [drawn(seed, number, reference)])


def drawn(seed: int, number: int, reference: Reference) -> Kill:
    """Kill `number` of a seed: any stage, and any moment of it, are equally likely."""
    chance = random.Random(f"{seed}/{number}")
    stage = chance.choice(reference.stages)
    if chance.random() < BY_TIME:
        return Kill(number, stage, None, share=chance.random())
    point = chance.choice([name for name in [*JOB, *LAUNCHING] if reference.calls[stage][name]])
    return Kill(number, stage, point, chance.randint(1, reference.calls[stage][point]))


def uninterrupted(folder: Path, command: Sequence[str]) -> Reference:
    root, notes = folder / "whole", folder / "calls"
    notes.mkdir(parents=True)
    attempt(root, command, None, {"FAULT_CALLS": str(notes)})
    records = [json.loads(path.read_text()) for path in root.glob("*/record.json")]
    records.sort(key=lambda record: record["run_id"].partition("-s")[2])
    calls = {record["stage"]: Counter(lines(notes / f"{record['stage']}.txt")) for record in records}
    for counted in calls.values():
        counted.update(dict.fromkeys(LAUNCHING, 1))  # each stage is launched once
    return Reference(root, {record["stage"]: record["wall_s"] for record in records}, calls)


def forked(root: Path, command: Sequence[str]) -> Reference:
    """A stage whose job is forked instead of launched: in a tenth of the time the same bits."""
    attempt(root, [*command, "--dry-run"], None, {})
    [place] = root.glob("*/config.json")
    stage = place.parent.name.partition("-s")[0]
    run_job(stage, place.parent, ranks=1)
    return Reference(root, {stage: 0.0}, {stage: Counter()})


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def walk(root: Path, command: Sequence[str], reference: Reference, kills: Sequence[Kill]) -> Outcome:
    """One reproduction with these kills, in the order of the stages; one that comes too late is left out."""
    landed = {}
    for kill in sorted(kills, key=lambda kill: due(kill, reference)):
        log.info("%s: %s (%d landed)", root.name, kill, len(landed))
        where = attempt(root, command, kill, {}, reference.seconds[kill.stage])
        if where:
            landed[kill] = where
    log.info("%s: to the end", root.name)
    attempt(root, command, None, {})
    found = pipelines(reference.root, root)
    broken = next(
        (stage for stage, run in finished(root).items() if any(run.name in line for line in found)), None
    )
    lost = [kill for kill in landed if kill.stage == broken] or [*landed] if found else []
    number = f"{kills[0].number} to {kills[-1].number}" if len(kills) > 1 else f"{kills[0].number}"
    return Outcome(
        f"kill -9 of everything, {number}",
        tried=len(landed),
        held=len(landed) - len(lost),
        told=f"{lost[0]}: {found[0]}"
        if found
        else f"the same bits: {', '.join(reference.stages)}; {told(landed)}",
    )


def told(landed: Mapping[Kill, str]) -> str:
    """How many kills came within their stage, and how many once it had ended."""
    counted = Counter(landed.values())
    return f"{counted[INSIDE]} {INSIDE}, {counted[AFTER]} {AFTER}"


def due(kill: Kill, reference: Reference) -> tuple:
    """Where in a walk a kill comes: by stage, then roughly by the moment within it."""
    if kill.point is None:
        within = kill.share
    elif kill.point in LAUNCHING:
        within = -1.0
    elif kill.point in ENDING and kill.point != "in evaluation":
        within = 1.0
    else:
        within = 0.9 * kill.nth / max(1, reference.calls[kill.stage][kill.point])
    return reference.stages.index(kill.stage), within, kill.point not in TRAINING, kill.number


def attempt(
    root: Path, command: Sequence[str], kill: Kill | None, added: dict[str, str], stage_s: float = 0.0
) -> str | None:
    """The command once; where the kill landed, if it did. Raises AssertionError where it failed by itself.

    Where the moment does not come any more, since an earlier kill's resume has less to do, the kill comes
    when its stage has ended: else the whole rest of the walk would go by.
    """
    root.mkdir(exist_ok=True)
    moment, marker, output = Moment(root, kill, stage_s), root / "marker", root / "output.txt"
    if moment.is_past():
        return None
    marker.unlink(missing_ok=True)
    variables = {**os.environ, **added, "PYTHONPATH": search_path(), "FAULT_MARKER": str(marker)}
    if kill and kill.point:
        variables["FAULT"] = f"{kill.stage}/{kill.point}/{kill.nth}"
    line = command_line(root, command)
    with output.open("ab") as file:
        process = subprocess.Popen(
            line, env=variables, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )
    deadline = time.monotonic() + LIMIT_S
    try:
        while process.poll() is None:
            if marker.exists():
                return INSIDE
            if moment.is_up() or moment.is_past(LATE_S):
                return AFTER if moment.is_past() else INSIDE
            assert time.monotonic() < deadline, f"{kill} hangs: {output.read_text()[-2000:]}"
            time.sleep(POLL_S)
    finally:
        kill_all(process)
    assert process.returncode == 0, (
        f"exit code {process.returncode} after {kill}: {output.read_text()[-3000:]}"
    )
    return None


def command_line(root: Path, command: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "r1pipe", *command, f"root={root}"]


def search_path() -> str:
    """PYTHONPATH: what stops processes, this folder's modules, r1pipe itself, and what was there."""
    places = [TESTS / "faults" / "inject", TESTS, TESTS.parent, os.environ.get("PYTHONPATH")]
    return os.pathsep.join(str(place) for place in places if place)


class Moment:
    """When a kill is due, as far as it can be seen from outside; points are told by a marker."""

    def __init__(self, root: Path, kill: Kill | None, stage_s: float):
        self.root, self.kill = root, kill
        self.by_time = kill is not None and kill.point is None
        self.wait_s = kill.share * stage_s if kill else 0.0
        self.began, self.ended = math.inf, math.inf
        self.before = {path: path.stat().st_size for path in self._files("log/launcher.txt")}

    def _files(self, name: str) -> list[Path]:
        """What the kill's stage has written under a name."""
        return [*self.root.glob(f"{self.kill.stage}-s*/{name}")] if self.kill else []

    def is_up(self) -> bool:
        """By time: a share of the stage's usual time has passed since its job began."""
        if self.by_time and math.isinf(self.began):
            grown = [
                path.stat().st_size > self.before.get(path, 0) for path in self._files("log/launcher.txt")
            ]
            self.began = time.monotonic() if any(grown) else math.inf
        return time.monotonic() - self.began >= self.wait_s and self.by_time

    def is_past(self, late_s: float = 0.0) -> bool:
        """Whether the stage has been done for so long."""
        if math.isinf(self.ended) and self._files("record.json"):
            self.ended = time.monotonic()
        return time.monotonic() - self.ended >= late_s


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the command and all that it has started, whatever process groups those are in."""
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        groups = {group_of(one) for one in family} - {None}
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        psutil.wait_procs([one for one in psutil.process_iter() if group_of(one) in groups], timeout=60)
    process.wait()


def group_of(process: psutil.Process) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(process.pid)
    return None
