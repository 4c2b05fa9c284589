"""Reinforcement in a test's own process, and what its run left."""

import json
from pathlib import Path

from r1pipe.config.schema import RLConfig
from r1pipe.rl.stage import reinforce, rules_only
from r1pipe.run import open_run


def go(folder: Path) -> None:
    with open_run(folder, RLConfig) as run:
        reinforce(run, rules_only)


def metrics_of(folder: Path) -> list[dict]:
    """Without what is a matter of time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time") and "per_s" not in k} for row in rows]
