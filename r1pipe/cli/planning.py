"""`r1pipe plan`: its overrides, its tables and its page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from r1pipe.cli.options import composed
from r1pipe.config import HFConfig, ModelConfig
from r1pipe.config.fields import check_all
from r1pipe.config.planning import (
    GROUPS,
    ClusterConfig,
    LayoutConfig,
    check_layout,
    layout_named,
    planning,
)
from r1pipe.config.rules import spread_rules
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.formatting import duration, number, percent
from r1pipe.core.terminal import console_of
from r1pipe.plan import planner, stages
from r1pipe.plan.planner import Phase, Plan, Planned

WIDTH = 120  # of the tables without a terminal
SHOWN = 8  # layouts of a search
SEARCHED = ("zero_level", "expert_parallel", "pipeline", "micro_batch", "recompute")


def plan_inputs(overrides: list[str]) -> tuple[ModelConfig, ClusterConfig, LayoutConfig, list[Phase]]:
    """What the overrides describe: a stage's own steps, or the phases of the layout. Raises ConfigError."""
    own = [word for word in overrides if word.partition("=")[0].partition(".")[0] in GROUPS]
    config = composed([word for word in overrides if word not in own])
    model = config.model
    if isinstance(model, HFConfig):
        raise ConfigError("model=hf cannot be planned yet: the work of DeepSeek-V3's shape alone is counted")
    cluster, layout = planning(own, model)
    if any(word.startswith("stage=") for word in overrides):
        if not any(word.startswith("layout=") for word in own):
            layout = layout_named(own, "default", stages.of_engine(config, cluster))
        layout = replace(layout, phases=[])
        phases = stages.phases_of(config, layout, cluster)
        check_all(spread_rules(config.stage, cluster.devices, f"{cluster.devices=}"))
        return model, cluster, layout, phases
    if not layout.phases:
        raise ConfigError(f"layout={layout.name} has no phases; give stage=NAME or another layout")
    return model, cluster, layout, [Phase(phase) for phase in layout.phases]


def what_if(line: str, overrides: list[str], layout: LayoutConfig) -> list[tuple[str, str, Plan]]:
    """(key, value, plan) for each value of KEY=VALUES in the chosen layout. Raises ConfigError."""
    key, _, values = line.partition("=")
    if key.partition(".")[0] not in GROUPS or "." not in key or not values:
        raise ConfigError(
            f"--what-if {line}: give KEY=VALUES, as in cluster.usd_per_hour=2,3 or layout.mfu=0.3,0.4"
        )
    plans = []
    for value in values.split(","):
        model, cluster, other, phases = plan_inputs([*overrides, f"{key}={value}"])
        same = {name: getattr(layout, name) for name in SEARCHED if key != f"layout.{name}"}
        other = replace(other, **same)
        check_layout(other, cluster, model)
        plans.append((key, value, planner.plan(model, cluster, other, phases)))
    return plans


def summary(plan: Plan) -> dict[str, Any]:
    return {
        "gpu_hours": plan.hours["total"],
        "usd": plan.usd,
        "fits": plan.fits,
        "memory_gb": plan.memory_gb,
    }


def layout_line(layout: LayoutConfig) -> str:
    parts = [f"{name} {getattr(layout, name)}" for name in SEARCHED]
    return ", ".join([layout.precision, *parts, layout.schedule])


def show(plan: Plan, found: Sequence[Plan], changed: Sequence[tuple[str, str, Plan]]) -> None:
    """Print the phases, the parts of time and memory, other layouts and what-ifs."""
    console = console_of(WIDTH)
    cluster = plan.cluster
    console.print(Text(f"{plan.model} on {cluster.name}: {layout_line(plan.layout)}", style="bold"))
    console.print(phases_table(plan))
    console.print(parts_table("seconds of a step", plan.phases, lambda one: one.step.parts(), "time"))
    console.print(parts_table("GB of a rank", plan.phases, lambda one: one.memory.gigabytes(), "memory"))
    for other in found[:SHOWN]:
        console.print(
            Text(f"{number(other.hours['total'], 4):>10} h  {layout_line(other.layout)}", style="dim")
        )
    if found:
        console.print(Text(f"{len(found)} layouts fit"))
    for key, value, other in changed:
        hours, usd = number(other.hours["total"], 4), number(other.usd, 4)
        console.print(f"{key}={value}: {hours} {cluster.unit} hours, ${usd}")
    verdict = "fits" if plan.fits else "does not fit"
    console.print(
        f"{verdict}: {plan.memory_gb:.1f} of {cluster.memory_gb:g} GB; "
        f"{number(plan.hours['total'], 4)} {cluster.unit} hours, ${number(plan.usd, 4)}"
    )


def phases_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("phase")
    columns = ("tokens", "length", "steps", "a step", "in all", "tokens/s", "MFU %")
    for name in (*columns, f"{plan.cluster.unit} h", "$"):
        table.add_column(name, justify="right")
    for one in plan.phases:
        config = one.phase.config
        table.add_row(
            config.name,
            f"{config.tokens:.3g}",
            str(config.sequence_length),
            f"{one.phase.steps:,}",
            duration(one.step.total),
            duration(one.step.total * one.phase.steps),
            number(one.tokens_per_device, 4),
            percent(one.mfu),
            number(one.hours),
            number(one.hours * plan.cluster.usd_per_hour),
        )
    return table


def parts_table(title: str, phases: Sequence[Planned], parts: Any, total: str) -> Table:
    """A column for each part that is not nothing, a row for each phase."""
    rows = [parts(one) for one in phases]
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("phase")
    for name in [*names, total]:
        table.add_column(name.replace("_", " "), justify="right")
    for one, row in zip(phases, rows, strict=True):
        whole = one.step.total if total == "time" else one.memory.total / planner.GIGA
        table.add_row(one.phase.config.name, *(number(row[name]) for name in names), number(whole))
    return table


def write_page(plan: Plan, path: Path) -> None:
    """Bars of time and memory by part. Raises EnvironmentProblem where the file cannot be written."""
    from r1pipe.cli.report.page import render

    names = [
        f"{one.phase.config.name.replace('_', ' ')}, {one.phase.config.sequence_length:,} tokens"
        for one in plan.phases
    ]
    times = [one.step.parts() for one in plan.phases]
    sizes = [one.memory.gigabytes() for one in plan.phases]
    pictures = [
        ("Seconds of a step", list(zip(names, times, strict=True)), None),
        (
            f"GB of a rank, of {plan.cluster.memory_gb:g}",
            list(zip(names, sizes, strict=True)),
            plan.cluster.memory_gb,
        ),
    ]
    text = render(
        "plan.html",
        title=f"{plan.model} on {plan.cluster.name}",
        plan=plan,
        layout=layout_line(plan.layout),
        pictures=[(title, bars(rows, limit)) for title, rows, limit in pictures],
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}; give another --html") from None


def bars(rows: list[tuple[str, dict[str, float]]], limit: float | None) -> dict[str, Any]:
    """Where each part's rectangle lies, in hundredths of the longest row, or of a longer limit."""
    longest = max([sum(parts.values()) for _, parts in rows] + ([limit] if limit else []))
    placed, names = [], [name for name in rows[0][1] if any(parts[name] for _, parts in rows)]
    for row, parts in rows:
        left, boxes = 0.0, []
        for name in names:
            width = 100 * parts[name] / longest
            boxes.append((name, names.index(name) % 8 + 1, left, width, parts[name]))
            left += width
        placed.append((f"{row}: {number(sum(parts.values()))}", boxes))
    return {"rows": placed, "names": names, "limit": 100 * limit / longest if limit else None}
