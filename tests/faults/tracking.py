"""MLflow's server killed and started again while runs are mirrored: everything arrives, and nothing twice."""

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from runfolders import build, metric_lines, write_lines
from tracker import Server, eventually, twice, view

from faults.outcome import Outcome
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.tracking import Mirror, mirror, sync

STEPS, AT_A_TIME = 40, 8


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    yield away_at_the_start(folder / "start")
    if short:  # a server takes too long to start; tests/test_tracking_server.py has one
        return
    server = Server(folder)
    mirror.EVERY_S = 0.05
    try:
        yield killed_in_the_middle(folder / "runs", server.start(), random.Random(seed), times=5)
    finally:
        server.kill()


def away_at_the_start(root: Path) -> Outcome:
    run_folder = build(root, "grpo", steps=2, uri="http://127.0.0.1:9")
    try:
        Mirror(run_folder, json.loads((run_folder / "config.json").read_text()))
    except EnvironmentProblem as error:
        held = "127.0.0.1:9" in str(error) and "tracking=none" in str(error)
        return Outcome("tracker away at the start", 1, int(held), str(error))
    return Outcome("tracker away at the start", 1, 0, "it started")


def killed_in_the_middle(root: Path, server: Server, draw: random.Random, times: int) -> Outcome:
    """Each run is written while the server dies at some moment, and is back at another."""
    for number in range(times):
        mirrored_while_it_dies(root, server, draw, number)
    if not server.answers():
        server.start()
    sync(root)
    shown = view(server.uri)
    fresh = f"sqlite:///{root}/fresh.db"
    sync(root, uri=fresh, rebuild=True)
    problems = twice(shown)
    for name, runs in view(fresh)["runs"].items():
        for key, value in runs[0].items():
            if shown["runs"][name][0][key] != value:
                problems.append(f"{key} of {name} is not what the run folder has")
    held = times if not problems and view(fresh) == shown else times - max(1, len(problems))
    told = problems[0] if problems else "after `r1pipe sync` point by point what a rebuild gives"
    return Outcome("tracker killed in the middle", times, max(0, held), told)


def mirrored_while_it_dies(root: Path, server: Server, draw: random.Random, number: int) -> None:
    run_id, created = f"grpo-{number}", f"2026-01-0{number + 1}T10:00:00"
    if not server.answers():
        server.start()
    folder = build(root, "grpo", steps=STEPS, created=created, run_id=run_id, uri=server.uri)
    (folder / "metrics.jsonl").unlink()
    record = (folder / "record.json").read_text()
    (folder / "record.json").unlink()
    follower = Mirror(folder, json.loads((folder / "config.json").read_text()), lambda line: None)
    eventually(lambda: run_id in view(server.uri)["runs"])
    killer = threading.Timer(draw.uniform(0.0, 0.5), server.kill)
    killer.start()
    lines = metric_lines("grpo", STEPS)
    for start in range(0, STEPS, AT_A_TIME):
        write_lines(folder / "metrics.jsonl", lines[start : start + AT_A_TIME])
        time.sleep(draw.uniform(0.0, 0.1))
    killer.join()
    (folder / "record.json").write_text(record)
    if draw.random() < 0.5:  # back before the job ends
        server.start()
    follower.finish()
