"""Ranks without torch, and a launcher that treats them as DeepSpeed's does: for tests of what watches them.

As a script it is the launcher, with the launcher's arguments; each rank runs this file again, with the run
folder alone. FAKE says what the last rank does after a while; the others wait for it as in a collective.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from r1pipe.config import read_config
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints, heartbeat, stopping

POLL_S = 0.3  # DeepSpeed's launcher: 1 s
WORK_S = 0.02
SLOW_S = 0.5
PRODUCT_S, OTHERS = 1.0, 6


def work(pieces: int) -> None:
    for _ in range(pieces):
        time.sleep(WORK_S)
        heartbeat.tick()


def meet(run: RunFolder, rank: int, world: int, number: int) -> None:
    """A collective: goes on once all ranks are there."""
    (run.path / f"met-{number}-{rank}").touch()
    if world > 1:
        with heartbeat.waiting():
            while not all((run.path / f"met-{number}-{other}").exists() for other in range(world)):
                time.sleep(0.01)


def hang() -> None:
    while True:
        time.sleep(0.05)


def hang_while_saving() -> None:
    with heartbeat.at("saving"):
        hang()


def hang_in_a_compiler() -> None:
    with heartbeat.at("compiling", patient=True):
        hang()


def save_slowly() -> None:
    """Writes and reads back for longer than a silent rank may take; then hangs elsewhere."""
    place = Path(sys.argv[1]) / "slow"
    with heartbeat.at("saving"):
        for _ in range(8):
            with heartbeat.to_write(place) as file:
                file.write(bytes(100_000))
            time.sleep(SLOW_S)
            checkpoints.file_hash(place)
            time.sleep(SLOW_S)
    with heartbeat.at("after saving"):
        hang()


def compute_starved() -> None:
    """Computes for longer than a silent rank may take, as others have most of its core; then hangs."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(OTHERS)]
    began, wall = time.process_time(), time.monotonic()
    with heartbeat.at("a long product"):
        while time.process_time() - began < PRODUCT_S:
            pass
    for other in others:
        other.kill()
        other.wait()
    (Path(sys.argv[1]) / "took").write_text(str(time.monotonic() - wall))
    with heartbeat.at("after it"):
        hang()


def wait_for_nobody() -> None:
    """In a collective that the other ranks never enter."""
    with heartbeat.waiting():
        hang()


def crash() -> None:
    raise RuntimeError("a tensor has the wrong shape")


FAULTS = {
    "hangs": hang,
    "hangs_while_saving": hang_while_saving,
    "hangs_in_a_compiler": hang_in_a_compiler,
    "saves_slowly": save_slowly,
    "starved": compute_starved,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "crashes": crash,
    "two_collectives": wait_for_nobody,
}


class Stops:
    """Asks, as `Ranks.agree_max` would; the fake ranks agree by files."""

    def __init__(self, run: RunFolder, rank: int, world: int):
        self.run, self.rank, self.world, self.met = run, rank, world, 0

    def agree_max(self, value: int) -> int:
        self.met += 1
        (self.run.path / f"value-{self.met}-{self.rank}").write_text(str(value))
        meet(self.run, self.rank, self.world, self.met)
        return max(int((self.run.path / f"value-{self.met}-{r}").read_text() or 0) for r in range(self.world))


def rank_main(path: str) -> None:
    run, how = RunFolder(path), os.environ.get("FAKE", "ok")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = read_config(run.config)
    with stopping.listening(run.stop, config.engine.grace_s), heartbeat.beating(run, rank):
        agreeing = Stops(run, rank, world)
        for step in range(1, 10**6):
            heartbeat.at_step(step)
            with heartbeat.at("update"):
                work(3)
                if rank == world - 1 and step == 3:
                    (run.path / "there").touch()
                    FAULTS.get(how, lambda: None)()
            number = stopping.agreed(agreeing)
            if number and how != "stays":
                if rank == 0:
                    (run.checkpoint(step)).mkdir(parents=True)
                    (run.checkpoint(step) / "manifest.json").write_text(json.dumps({"files": {}}))
                raise SystemExit(128 + number)
            (run.path / "there").touch()


def launcher_main(arguments: list[str]) -> int:
    world, script = int(arguments[2]), arguments[-1]
    ranks = []
    for rank in range(world):
        variables = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
        ranks.append(subprocess.Popen([sys.executable, __file__, script], env=variables))

    def end(number: int, frame: object) -> None:
        for process in ranks:
            process.terminate()
        for process in ranks:
            process.wait()
        sys.exit(1)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed:
            for process in ranks:
                process.terminate()
            for process in ranks:
                process.wait()
            print(f"{script} exits with return code = {failed[0]}", flush=True)
            return failed[0] & 0xFF
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_S)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(launcher_main(sys.argv[1:]))
    rank_main(sys.argv[1])
