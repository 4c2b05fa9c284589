"""What the report shows, read from run folders; an optional file that is missing or damaged leaves its part
empty."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from r1pipe.runs.files import Tail, read_json
from r1pipe.runs.results import StoredRun, choose, row, stored_runs


class StageRun(StoredRun):
    """One run, finished or not, with the files of its folder."""

    @cached_property
    def row(self) -> dict[str, Any]:
        """Of the table of stages."""
        return row(self)

    @property
    def seed(self) -> int:
        return self.row["seed"] or 0

    @property
    def is_rl(self) -> bool:
        return any("reward" in line for line in self.metrics)

    @cached_property
    def env(self) -> dict[str, Any]:
        return read_json(self.folder.env)

    @cached_property
    def metrics(self) -> list[dict]:
        """Lines of metrics.jsonl that have a step, by step."""
        lines = [line for line in Tail(self.folder.metrics).read() if isinstance(line.get("step"), int)]
        return sorted(lines, key=lambda line: line["step"])

    @cached_property
    def dev_evaluations(self) -> list[dict]:
        """Lines of dev_evaluations.jsonl by step; [] of older runs."""
        lines = [
            line
            for line in Tail(self.folder.dev_evaluations).read()
            if isinstance(line.get("step"), int)
            and isinstance(line.get("metrics"), dict)
            and isinstance(line.get("samples"), list)
        ]
        return sorted(lines, key=lambda line: line["step"])

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was logged; short evaluations before the first step and
        after the last one count."""
        known = {line["step"]: line["metrics"].get(name) for line in self.dev_evaluations}
        known |= {line["step"]: line[name] for line in self.metrics if name in line}
        values = {step: value for step, value in sorted(known.items()) if isinstance(value, int | float)}
        return list(values), list(values.values())

    @cached_property
    def samples(self) -> list[dict]:
        return _list(self.folder.samples)

    @cached_property
    def funnel(self) -> list[dict]:
        return _list(self.folder.data / "funnel.json")

    @property
    def wall_s(self) -> float:
        """Of a run without a record, the time of its last step, or of what it showed last."""
        if self.record is not None:
            return self.record.get("wall_s", 0.0)
        of_steps = max((line.get("time") or 0.0 for line in self.metrics), default=0.0)
        return max([of_steps, *self.clock[-1:]])

    @cached_property
    def clock(self) -> list[float]:
        """The run's own time, in seconds, at each line of progress.jsonl."""
        times = [line.get("time") for line in Tail(self.folder.progress).read()]
        return [float(time) for time in times if isinstance(time, int | float)]

    @property
    def undone_s(self) -> float:
        """Seconds by which the clock went back: a resumed run's starts again at its last checkpoint."""
        return sum(max(0.0, before - after) for before, after in pairwise(self.clock))

    @property
    def devices(self) -> tuple[int, str]:
        """How many of what the job occupied: GPUs, or cores where it used none."""
        known = self.env.get("devices") or {}
        if known:
            return known["count"], known["unit"]
        engine = self.config.get("engine") or {}  # env.json of an older version
        ranks = engine.get("ranks") or 1
        if engine.get("accelerator") == "cuda":
            return ranks, "GPU"
        cores = (self.env.get("machine") or {}).get("cores") or ranks
        return ranks * engine["threads"] if engine.get("threads") else cores, "core"


def cost(runs: Iterable[StageRun]) -> str:
    """Hours of all GPUs and of all cores, which are not added: `1.250 GPU-hours + 0.300 core-hours`."""
    hours: dict[str, float] = defaultdict(float)
    for run in runs:
        count, unit = run.devices
        hours[unit] += run.wall_s / 3600 * count
    return " + ".join(f"{spent:.3f} {unit}-hours" for unit, spent in sorted(hours.items()))


def _list(path: Path) -> list[dict]:
    """The file's list of JSON objects; [] when it is missing or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


def load_runs(root: Path | str, names: Sequence[str] | None, pipeline: str | None) -> list[StageRun]:
    """The chosen runs; see `results.choose`. Raises CheckpointError for an unknown one among `names`."""
    return [StageRun(**vars(run)) for run in choose(root, names, pipeline)]


def other_runs(root: Path | str, chosen: Sequence[StageRun]) -> list[StageRun]:
    """Runs under `root` that the report does not show: interrupted, tried, or made again later.

    Their cost belongs to an honest account of what the result took.
    """
    shown = {run.folder.path.resolve() for run in chosen}
    others = [
        StageRun(**vars(run)) for run in stored_runs(Path(root)) if run.folder.path.resolve() not in shown
    ]
    return [run for run in others if run.wall_s]  # a dry run took no time
