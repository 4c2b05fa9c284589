"""Finished runs beside what the planner says of them: the memory of a rank, the seconds of a step.

    make bench-plan ARGS="--root runs"

The planner gets a run's steps and the lengths that its prompts and completions had; the cluster has as many
devices as the run had ranks. Seconds are of updates and, in reinforcement, of sampling: they tell something
where nothing else ran on the machine. Memory is that before the last evaluation, which is not planned.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from r1pipe.config import ModelConfig, RLConfig, RunConfig, read_config
from r1pipe.config.planning import ClusterConfig, LayoutConfig, cluster_named, layout_named
from r1pipe.core.errors import ConfigError, R1pipeError
from r1pipe.plan import stages
from r1pipe.plan.planner import GIGA, planned
from r1pipe.runs.files import metric_lines
from r1pipe.runs.results import StoredRun, stored_runs

Lines = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Row:
    """Measured and planned."""

    run_id: str
    memory_gb: tuple[float, float]
    step_s: tuple[float, float]


def mean(lines: Lines, name: str) -> float:
    return fmean(line[name] for line in lines if name in line)


def lengths(config: RunConfig, lines: Lines) -> dict[str, Any]:
    """Values of a layout: tokens of prompts and completions, as they were in reinforcement."""
    stage = config.stage
    if not isinstance(stage, RLConfig):
        return {}
    completion = mean(lines, "completions/mean_length")
    rows = stage.prompts_per_step * stage.group_size * stage.inner_epochs
    trained = fmean(line["train/tokens_per_s"] * line["time/update_s"] for line in lines) / rows
    longest = min(stage.sampling.max_tokens, config.model.max_position_embeddings)
    return {
        "prompt_tokens": max(1, round(trained - completion)),
        "completion_share": min(1.0, completion / longest),
    }


def row_of(run: StoredRun, cluster: ClusterConfig) -> Row:
    """Raises ConfigError where the planner has no answer, or the record none of these figures."""
    config, record = read_config(run.folder.config), run.record
    model, ranks = config.model, config.engine.ranks
    if record is None or "training" not in record.get("memory_gb", {}):
        raise ConfigError("its record has no memory_gb of training")
    if not isinstance(model, ModelConfig):
        raise ConfigError("model=hf cannot be planned yet")
    if ranks != cluster.devices:
        raise ConfigError(f"it has {ranks} ranks; give cluster.devices={ranks}")
    steps = record["steps"]
    config = replace(config, stage=replace(config.stage, max_steps=steps))
    lines = [line for _, line in metric_lines(run.folder.metrics)]
    layout: LayoutConfig = layout_named([], "default", stages.of_engine(config, cluster))
    layout = replace(layout, **lengths(config, lines))
    phase = stages.phase_of(config, layout)
    found = planned(model, cluster, layout, phase)
    took = sum(record["seconds"].get(name, 0.0) for name in ("update", "sampling"))
    if phase.rollout is None:  # sampling made the data of an SFT
        took = record["seconds"]["update"]
    in_all = found.step.total * phase.steps
    return Row(
        run.folder.run_id,
        (record["memory_gb"]["training"], found.memory.total / GIGA),
        (took / steps, in_all / steps),
    )


def table(rows: Sequence[Row]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("run")
    for name in ("GB a rank", "planned", "off", "s a step", "planned", "off"):
        shown.add_column(name, justify="right")
    for row in rows:
        cells = []
        for measured, found in (row.memory_gb, row.step_s):
            cells += [f"{measured:.3g}", f"{found:.3g}", f"{found / measured - 1:+.0%}"]
        shown.add_row(row.run_id, *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a root; 0, or 2 with one line where it has no row."""
    parser = argparse.ArgumentParser(prog="python -m bench.plans", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*", default=[], help="of the cluster; cluster=laptop")
    given = parser.parse_args(arguments)
    rows = []
    try:
        cluster = cluster_named(given.overrides or ["cluster=laptop"])
        for run in stored_runs(given.root):
            try:
                rows.append(row_of(run, cluster))
            except ConfigError as error:
                print(f"{run.folder.run_id} is left out: {error}", file=sys.stderr)
        if not rows:
            raise ConfigError(f"no run under {given.root} can be planned; give --root DIR of finished runs")
    except R1pipeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
