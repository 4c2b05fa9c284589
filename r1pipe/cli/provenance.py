"""`r1pipe provenance`: what a checkpoint was trained on, in shares, and where any sample came from."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1pipe.core.errors import DataError
from r1pipe.core.formatting import percent
from r1pipe.core.terminal import console_of
from r1pipe.launch.panel import mask_controls
from r1pipe.runs.lineage import training_data
from r1pipe.runs.lineage.ancestors import Ancestor

WIDTH = 110  # of a table without a terminal
UNKNOWN = "unknown"
SHOWN = 8  # values of a share on the screen; --json has all
LONGEST = 300  # characters of a text on the screen
TITLES = {
    "source": "who wrote it",
    "prompt_source": "where the prompt came from",
    "edge": "weights: of this model; data: of one that made its data",
}
TEXTS = ("question", "response", "completion")


def summed_up(found: Sequence[Ancestor]) -> dict[str, Any]:
    """All of it, as plain JSON. Raises CheckpointError."""
    runs = training_data.of_ancestors(found)
    start = found[0].parent
    total = sum(run.rows or 0 for run in runs)
    return {
        "checkpoint": asdict(start),
        "rows": total,
        "runs": [{**asdict(run), "counts": _listed(run.counts, run.rows or 0)} for run in runs],
        "shares": _listed(training_data.shares(runs), total),
        "problems": [problem for one in found for problem in one.problems],
    }


def _listed(counts: training_data.RowCounts, total: int) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {"value": value, "rows": rows, "share": rows / total if total else None}
            for value, rows in values.items()
        ]
        for name, values in counts.items()
    }


def show(summary: dict[str, Any]) -> None:
    console = console_of(WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "stage", "edge", "trained on", "rows", "tokens"):
        table.add_column(column, justify="right" if column in ("rows", "tokens") else "left")
    for run in summary["runs"]:
        kind = f"{run['kind']}: {run['note']}" if run["note"] else run["kind"]
        counts = [UNKNOWN if run[name] is None else f"{run[name]:,}" for name in ("rows", "tokens")]
        table.add_row(run["run_id"], run["stage"], run["edge"], kind, *counts)
    console.print(table)
    if summary["rows"]:
        console.print(f"\nShares of its {summary['rows']:,} rows", style="bold")
    for name, values in summary["shares"].items():
        if not values:
            continue
        title = f" ({TITLES[name]})" if name in TITLES else ""
        parts = [f"{value['value'] or UNKNOWN} {percent(value['share'])}%" for value in values[:SHOWN]]
        more = f", and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
        console.print(Text(mask_controls(f"{name}{title}: {', '.join(parts)}{more}")), soft_wrap=True)
    for problem in summary["problems"]:
        console.print(Text(mask_controls(problem), "red"), soft_wrap=True)


def way_of(found: Sequence[Ancestor], sample: str) -> list[dict[str, Any]]:
    """Where a prompt's samples were learned from. Raises DataError where they were not."""
    places = list(training_data.find(found, sample))
    if not places:
        raise DataError(
            f"--sample {sample}: nothing in this lineage has been trained on it; an id is a prompt_id, as "
            "`r1pipe samples --json` shows it"
        )
    return places


def show_way(places: Sequence[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    for place in places:
        where = f"{place['run_id']} ({place['stage']}), {place['file']}"
        console.print(Text(mask_controls(where), "bold"), soft_wrap=True)
        for name, value in place.items():
            if name in ("run_id", "stage", "file", "step"):
                continue
            text = str(value)
            text = f"{text[:LONGEST]} […]" if name in TEXTS and len(text) > LONGEST else text
            console.print(Text(mask_controls(f"  {name}: {text}")), soft_wrap=True)
