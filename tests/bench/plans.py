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

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from r1pipe.config import ModelConfig, RewardModelConfig, RLConfig, RunConfig, read_config
from r1pipe.config.planning import ClusterConfig, LayoutConfig, cluster_named, layout_named
from r1pipe.core.errors import ConfigError, R1pipeError
from r1pipe.plan import stages
from r1pipe.plan.planner import GIGA, Phase, planned
from r1pipe.runs.files import metric_lines
from r1pipe.runs.results import StoredRun, stored_runs
from r1pipe.runs.reward_model_quality import HARMLESS, HELPFUL

Lines = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Row:
    """Measured and planned."""

    run_id: str
    memory_gb: tuple[float, float]
    step_s: tuple[float, float]


def mean(lines: Lines, name: str) -> float:
    return fmean(line[name] for line in lines if name in line)


def longest_rows(run: StoredRun) -> dict[str, int]:
    """Tokens of the longest row that a reward model of each kind has learned from; of a pair, of its mean."""
    rows = pq.read_table(run.folder.trained_on, columns=["kind", "tokens"]).to_pylist()
    return {
        kind: max(row["tokens"] for row in rows if row["kind"] == name) // of_one
        for kind, (name, of_one) in {HELPFUL: ("preferences", 2), HARMLESS: ("labels", 1)}.items()
        if any(row["kind"] == name for row in rows)
    }


def with_rows(phase: Phase, longest: int) -> Phase:
    """A reward model's phase with rows of so many tokens, in place of the whole context."""
    steps = replace(
        phase.config, sequence_length=longest, tokens=float(phase.steps * phase.config.batch_size * longest)
    )
    return replace(
        phase, config=steps, longest=longest, largest_pass=phase.largest_pass * longest // phase.longest
    )


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
    measured = dict[str, float]() if record is None else record.get("memory_gb", {})
    trained = "all" if isinstance(config.stage, RewardModelConfig) else "training"
    if record is None or trained not in measured:
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
    phases = stages.phases_of(config, layout, cluster)
    if isinstance(config.stage, RewardModelConfig):
        phases = [
            with_rows(phase, rows) for phase, rows in zip(phases, longest_rows(run).values(), strict=True)
        ]
    found = [planned(model, cluster, layout, phase) for phase in phases]
    took = sum(record["seconds"].get(name, 0.0) for name in ("update", "sampling"))
    if phases[0].rollout is None:  # sampling made the data of an SFT
        took = record["seconds"]["update"]
    in_all = sum(one.step.total * one.phase.steps for one in found)
    return Row(
        run.folder.run_id,
        (measured[trained], max(one.memory.total for one in found) / GIGA),
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
