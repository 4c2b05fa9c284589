"""What the report shows, read from run folders; a file that is missing leaves its part empty."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from r1pipe.cli.compare import choose, read_json, read_record, row
from r1pipe.core.paths import RunFolder
from r1pipe.runs.jsonl import Tail


@dataclass
class StageRun:
    """One finished run."""

    folder: RunFolder
    row: dict  # of the table of stages
    record: dict
    config: dict

    @property
    def stage(self) -> str:
        return str(self.row["stage"])

    @property
    def seed(self) -> int:
        return self.row["seed"] or 0

    @property
    def control(self) -> bool:
        return self.row["control"]

    @property
    def is_rl(self) -> bool:
        return any("reward" in line for line in self.metrics)

    @cached_property
    def metrics(self) -> list[dict]:
        """Lines of metrics.jsonl that have a step, by step."""
        lines = [line for line in Tail(self.folder.metrics).read() if isinstance(line.get("step"), int)]
        return sorted(lines, key=lambda line: line["step"])

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was logged."""
        points = [
            (line["step"], line[name]) for line in self.metrics if isinstance(line.get(name), int | float)
        ]
        return [step for step, _ in points], [value for _, value in points]

    def names(self, group: str) -> list[str]:
        """Metrics logged under `group/`, in the order they first appeared."""
        names = (name for line in self.metrics for name in line)
        return [name for name in dict.fromkeys(names) if name.startswith(f"{group}/")]

    @cached_property
    def samples(self) -> list[dict]:
        return _list(self.folder.samples)

    @cached_property
    def funnel(self) -> list[dict]:
        return _list(self.folder.data / "funnel.json")

    @property
    def wall_s(self) -> float:
        return float(self.record.get("wall_s") or 0.0)

    @property
    def unit(self) -> str:
        """What its cost is counted in."""
        return "GPU-hours" if (self.config.get("engine") or {}).get("accelerator") == "cuda" else "core-hours"

    @property
    def cost(self) -> float:
        """Hours of all its GPUs, or of all its cores where there is none."""
        return self.wall_s / 3600 * self.devices

    @property
    def devices(self) -> int:
        engine = self.config.get("engine") or {}
        ranks = engine.get("ranks") or 1
        if self.unit == "GPU-hours":
            return ranks
        everything = (read_json(self.folder.env).get("machine") or {}).get("cores") or os.cpu_count() or 1
        return ranks * engine["threads"] if engine.get("threads") else everything


def _list(path: Path) -> list[dict]:
    """The file's list of JSON objects; [] when it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


def load_runs(root: Path | str, runs: Sequence[str] | None, pipeline: str | None) -> list[StageRun]:
    """The chosen runs in the recipe's order. Raises CheckpointError for an unknown one among `runs`."""
    folders = choose(root, runs, pipeline)
    return [StageRun(one, row(one), read_record(one), read_json(one.config)) for one in folders]


def other_runs(root: Path | str, chosen: Sequence[StageRun]) -> list[StageRun]:
    """Runs under `root` that the report does not show: interrupted, tried, or made again later.

    Their cost belongs to an honest account of what the result took.
    """
    shown = {run.folder.path.resolve() for run in chosen}
    others = []
    for path in sorted(Path(root).glob("*/config.json")):
        folder = RunFolder(path.parent)
        if folder.path.resolve() in shown:
            continue
        record = read_record(folder)
        run = StageRun(folder, row(folder), record, read_json(folder.config))
        if not record:
            run.record = {"wall_s": max((line.get("time") or 0.0 for line in run.metrics), default=0.0)}
        others.append(run)
    return others
