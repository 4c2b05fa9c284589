"""`r1pipe compare`: the table of runs, on the screen."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1pipe.config.changes import HASH_SHOWN, PARENTS
from r1pipe.config.fields import shown
from r1pipe.core.formatting import number, percent
from r1pipe.runs import reward_model_quality
from r1pipe.runs.results import COLUMNS

LEAST = ("cons", "len", "seed", "greedy", "pref", "time")  # left out first on a narrow terminal
WIDTH = 100  # of the table, without a terminal
BENCHMARK_COLUMNS = ("seed", "pass@1 (95%)", "greedy", "cons", "len", "cut")


def _table(table_rows: list[dict], left_out: Sequence[str]) -> Table:
    settings = [key for key in _setting_keys(table_rows) if key not in left_out]
    columns = {name: cell for name, cell in COLUMNS.items() if name not in left_out}
    named = "settings" in table_rows[0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run" if named else "stage", no_wrap=True)
    for key in settings:
        table.add_column(key, justify="right")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    has_heading = named or table_rows[0]["control"]  # nothing but controls needs none
    for row in table_rows:
        if row["control"] and not has_heading:
            table.add_row("controls", style="italic dim")
            has_heading = True
        cells = []
        for key in settings:
            text = shown(row["settings"].get(key, "-"))
            cells.append(text[:HASH_SHOWN] if key.startswith(PARENTS) else text)
        cells += [cell(row) for cell in columns.values()]
        name = str(row["run_id"] if named else row["stage"])
        table.add_row(name, *cells, style="dim" if row["control"] and not named else None)
    return table


def _setting_keys(table_rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in table_rows for key in row.get("settings", {})))


def _width(table: Table, console: Console) -> int:
    """Columns that the table would fill if it had the room."""
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def show(table_rows: list[dict], console: Console | None = None) -> None:
    """Prints the table: the recipe's stages, then its controls; or the runs named, with what differs.

    Runs that measured a benchmark have a table of their own before it.
    """
    console = console or Console()
    measured = [row for row in table_rows if row.get("benchmark") and "settings" not in row]
    stages = [row for row in table_rows if row not in measured]
    if not table_rows:
        console.print("No finished run yet.")
    if measured:
        show_benchmarks(measured, console)
    if measured and stages:
        console.print()
    if stages:
        show_stages(stages, console)


def show_stages(table_rows: list[dict], console: Console) -> None:
    """Without a terminal nothing is left out; a narrow terminal loses the columns in `LEAST`, then settings,
    and a line says which."""
    if "settings" not in table_rows[0]:
        table_rows = sorted(table_rows, key=lambda row: row["control"])
    left_out: list[str] = []
    table = _table(table_rows, left_out)
    console = _wide(table, console)
    for name in [*LEAST, *reversed(_setting_keys(table_rows))]:
        if _width(table, console) > console.width:
            left_out.append(name)
            table = _table(table_rows, left_out)
    console.print(table)
    if left_out:
        console.print(Text(f"a wider terminal shows: {', '.join(left_out)}", style="dim"))
    for line in notes(table_rows):
        console.print(Text(line, style="dim"))


def _wide(table: Table, console: Console) -> Console:
    """A console with room for the whole table where there is no terminal, else the same."""
    if console.is_terminal:
        return console
    width = max(WIDTH, console.width, _width(table, console))
    return Console(file=console.file, width=width, color_system=None)


def show_benchmarks(rows: list[dict], console: Console) -> None:
    """A row for each benchmark and checkpoint. A narrow terminal loses the columns in `LEAST`."""
    left_out: list[str] = []
    table = _benchmarks(rows, left_out)
    console = _wide(table, console)
    for name in LEAST:
        if _width(table, console) > console.width:
            left_out.append(name)
            table = _benchmarks(rows, left_out)
    console.print(table)
    legend = "copied: questions in what the checkpoint was trained on, where that is known"
    console.print(Text(legend, style="dim"))


def _benchmarks(rows: list[dict], left_out: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = [name for name in BENCHMARK_COLUMNS if name not in left_out]
    for name in ("benchmark", "checkpoint"):
        table.add_column(name, no_wrap=True)
    for name in (*names, "problems", "k", "copied"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        found = row.get("contamination") or {}
        copied = number(found.get("copied")) if found.get("searched") else "-"
        counts = [number(row.get("problems")), number(row.get("k")), copied]
        whose = row["parent"] or row["stage"]
        table.add_row(row["benchmark"], whose, *(COLUMNS[name](row) for name in names), *counts)
    return table


def without_warnings(row: dict) -> dict:
    """The row of a run that has just ended, without what its job has warned of."""
    kept = {name: value for name, value in row.items() if name != "forced_judges"}
    if judge := kept.get("judge"):
        kept["judge"] = {**judge, "weaknesses": []}
    if judged := kept.get("judged"):
        kept["judged"] = {**judged, "judge": {**judged["judge"], "weaknesses": []}}
    return kept


def notes(table_rows: list[dict]) -> Iterator[str]:
    """How many samples and problems the rows were measured on, in one line where all are alike; then the
    quality of each reward model, and which weak ones a stage was forced to use."""
    groups: dict[str, list[str]] = {}
    for row in table_rows:
        if row.get("samples") and row.get("problems"):
            counts = f"{row['samples']:,} samples of {row['problems']:,} held-out problems"
            groups.setdefault(counts, []).append(str(row["run_id"] if "settings" in row else row["stage"]))
    for counts, names in groups.items():
        whose = "" if len(groups) == 1 else f" ({', '.join(dict.fromkeys(names))})"
        yield f"pass@1: mean over {counts}{whose}; shares in %, len in tokens"
    for row in table_rows:
        whose = f"{row['stage']}, seed {row['seed']}"
        for kind, measured in (row.get("reward_models") or {}).items():
            yield f"{whose}, {reward_model_quality.describe(kind, measured)}"
        if weaknesses := row.get("forced_judges"):
            yield f"{whose}, used weak reward models: {'; '.join(weaknesses)}"
        judge = row.get("judge") or (row.get("judged") or {}).get("judge") or {}
        if weaknesses := judge.get("weaknesses"):
            yield f"{whose}, used a weak judge: {'; '.join(weaknesses)}"
        if judged := row.get("judged"):
            yield f"{whose}, {describe_judged(judged)}"
        if len(table_rows) == 1 and row.get("refusals"):
            yield f"{whose}, {describe_refusals(row['refusals'])}"


def describe_judged(judged: dict[str, Any]) -> str:
    """What a judge says of general answers, in a line."""
    parts = [
        f"{kind} {judged[kind]['mean']:.2f}"
        for kind in ("pointwise", "harmless")
        if judged.get(kind, {}).get("mean") is not None
    ]
    compared = judged.get("comparison")
    if compared and compared["win_rate"] is not None:
        low, high = compared["win_rate_ci"]
        parts.append(
            f"preferred in {percent(compared['win_rate'])}% [{percent(low)}, {percent(high)}] of "
            f"{compared['n']} pairs with {compared['baseline']}, at equal length in "
            f"{percent(compared['length_controlled'])}%"
        )
    return f"judge {judged['judge']['name']}: {', '.join(parts) or 'no verdict could be read'}"


def describe_refusals(found: dict[str, Any]) -> str:
    """Refusals by kind of risk beside needless ones, in a line."""
    by_risk = ", ".join(f"{risk} {percent(row['share'])}%" for risk, row in found["by_risk"].items())

    def share(name: str) -> str:
        return f"{percent(found[name]['share'])}% of {found[name]['n']}" if found[name]["n"] else "none asked"

    unsafe = f"{share('refused')} ({by_risk})" if by_risk else share("refused")
    return f"unsafe requests refused: {unsafe}; safe ones refused: {share('over_refused')}"
