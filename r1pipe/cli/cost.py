"""`r1pipe cost`: a root's ledger, where the pristine cost of the results stands beside all that was spent.

The published cost of DeepSeek-V3 is that of one pristine run; failed runs, ablations and staff are left out.
Here, runs that made no result are lines of their own, from run folders.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from r1pipe.cli.report.load import StageRun, load_runs, other_runs
from r1pipe.config.planning import cluster_named
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.formatting import number
from r1pipe.core.terminal import console_of

HOUR = 3600.0
WIDTH = 100  # of the table without a terminal
LINES = {
    "results": "the newest finished run of each stage of the recipe and seed",
    "controls": "the newest finished run of each control and seed",
    "made_again": "finished runs that a later one replaced",
    "unfinished": "runs that failed or were stopped",
    "done_twice": "steps that a kill undid, in runs that were resumed",
}


@dataclass(frozen=True)
class Rates:
    """What an hour of a device costs; None: not given."""

    unit: str | None  # GPU or core; None: GPUs, or cores where no GPU was used
    usd_per_hour: float | None
    watts: float | None

    @classmethod
    def of(cls, overrides: list[str], usd_per_hour: float | None, watts: float | None) -> "Rates":
        """Of cluster=NAME, if given; the options come before its values."""
        if not overrides:
            return cls(None, usd_per_hour, watts)
        cluster = cluster_named(overrides)
        price = cluster.usd_per_hour if usd_per_hour is None else usd_per_hour
        return cls(cluster.unit, price, cluster.watts if watts is None else watts)

    def line(self, hours: dict[str, float], unit: str) -> dict[str, Any]:
        priced = hours.get(unit, 0.0)
        return {
            "hours": {f"{kind}_hours": spent for kind, spent in sorted(hours.items())},
            "usd": None if self.usd_per_hour is None else priced * self.usd_per_hour,
            "kwh": None if self.watts is None else priced * self.watts / 1000,
        }


def ledger(root: Path, rates: Rates) -> dict[str, Any]:
    """{"lines": {name: {"runs", "hours", "usd", "kwh"}}, "pristine": {...}, "true": {...}}.

    Raises EnvironmentProblem where the root has no runs.
    """
    newest = load_runs(root, None, None)
    others = other_runs(root, newest)
    if not newest and not others:
        raise EnvironmentProblem(f"no runs under {root}; give root=DIR")
    groups: dict[str, list[StageRun]] = {
        "results": [run for run in newest if not run.is_control],
        "controls": [run for run in newest if run.is_control],
        "made_again": [run for run in others if run.record is not None],
        "unfinished": [run for run in others if run.record is None],
    }
    spent = {name: hours((run, run.wall_s) for run in runs) for name, runs in groups.items()}
    resumed = [run for run in (*newest, *others) if run.undone_s]
    spent["done_twice"] = hours((run, run.undone_s) for run in resumed)
    units = {unit for line in spent.values() for unit in line}
    unit = rates.unit or ("GPU" if "GPU" in units else "core")
    total = {kind: sum(line.get(kind, 0.0) for line in spent.values()) for kind in units}
    counts = {name: len(runs) for name, runs in (*groups.items(), ("done_twice", resumed))}
    return {
        "root": str(root),
        "priced": unit if rates.usd_per_hour is not None or rates.watts is not None else None,
        "lines": {name: {"runs": counts[name], **rates.line(spent[name], unit)} for name in LINES},
        "pristine": rates.line(spent["results"], unit),
        "true": rates.line(total, unit),
    }


def hours(spent: Iterable[tuple[StageRun, float]]) -> dict[str, float]:
    """Device hours by unit, of runs and the seconds that count of each."""
    found: dict[str, float] = {}
    for run, seconds in spent:
        count, unit = run.devices
        found[unit] = found.get(unit, 0.0) + seconds * count / HOUR
    return found


def show(found: dict[str, Any]) -> None:
    console = console_of(WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what")
    for column in ("runs", "GPU h", "core h", "kWh", "$"):
        table.add_column(column, justify="right")
    rows = [(LINES[name], line) for name, line in found["lines"].items() if line["runs"]]
    rows += [("pristine: the results alone", found["pristine"]), ("true: all of it", found["true"])]
    for what, line in rows:
        spent = line["hours"]
        values = (spent.get("GPU_hours"), spent.get("core_hours"), line["kwh"], line["usd"])
        table.add_row(what, str(line.get("runs", "")), *(number(value) for value in values))
    console.print(table)
    console.print("Staff, and machines that were rented and idle, are in no run folder.", style="dim")
