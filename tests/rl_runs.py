"""Reinforcement in a test's own process, and what its run left."""

import json
from pathlib import Path

from faults.same import timed

from r1pipe.config import RLConfig
from r1pipe.train.rl.stage import reinforce, rules_only
from r1pipe.train.run import open_run


def go(folder: Path) -> None:
    with open_run(folder, RLConfig) as run:
        reinforce(run, rules_only)


def metrics_of(folder: Path) -> list[dict]:
    """Without what is a matter of time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not timed(key)} for row in rows]
