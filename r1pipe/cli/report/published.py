"""What was published of DeepSeek-R1 (conf/published/r1.yaml), beside runs of the same benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1pipe.cli.report.load import StageRun
from r1pipe.config.fields import Strict, build
from r1pipe.config.groups import read

METRICS = ("pass@1", "EM", "3-shot F1", "cons@64")  # that a run of ours has: the others are other units


@dataclass
class PublishedRow(Strict):
    """One benchmark of a table: a value for each of its models."""

    benchmark: str  # the file in conf/benchmark/
    metric: str  # as it was published
    values: list[float | None]  # null: not published


@dataclass
class PublishedTable(Strict):
    """A published table."""

    title: str  # as the report heads it
    source: str  # paper and table
    models: list[str]  # its columns
    rows: list[PublishedRow]


@dataclass(frozen=True)
class Line:
    """One model or run on a benchmark; shares in 0..1."""

    name: str
    metric: str
    share: float
    interval: list[float] | None = None  # of ours
    source: str = ""  # of published ones; "": ours
    run: StageRun | None = None


def tables() -> list[PublishedTable]:
    """Every published table. Raises ConfigError where a file of conf/ is damaged."""
    return [build(PublishedTable, table, "published") for table in read("published/r1")["tables"]]


def title_of(benchmark: str) -> str:
    return str(read(f"benchmark/{benchmark}")["title"])


def beside(runs: Sequence[StageRun]) -> dict[str, list[Line]]:
    """For each benchmark that a run measured, the runs and the published models, the best first."""
    found: dict[str, list[Line]] = {}
    for run in runs:
        if run.row["benchmark"] is not None:
            found.setdefault(run.row["benchmark"], []).extend(_of_run(run))
    for benchmark, lines in found.items():
        lines += [line for table in tables() for line in _of_table(table, benchmark)]
        lines.sort(key=lambda line: -line.share)
    return {title_of(name): lines for name, lines in found.items()}


def _of_run(run: StageRun) -> list[Line]:
    row: dict[str, Any] = run.row
    name = row["parent"] or run.stage
    shares = {"pass@1": row["pass_at_1"], f"cons@{row['k']}": row["cons_at_k"], "F1": row["f1"]}
    lines = {metric: share for metric, share in shares.items() if share is not None}
    return [
        Line(name, metric, share, row["pass_at_1_ci"] if metric == "pass@1" else None, run=run)
        for metric, share in lines.items()
    ]


def _of_table(table: PublishedTable, benchmark: str) -> list[Line]:
    return [
        Line(model, row.metric, value / 100, source=table.source)
        for row in table.rows
        if row.benchmark == benchmark and row.metric in METRICS
        for model, value in zip(table.models, row.values, strict=True)
        if value is not None
    ]
