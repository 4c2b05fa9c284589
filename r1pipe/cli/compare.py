"""The table of stages, read from the records of finished runs: `r1pipe compare`, and the report's."""

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1pipe.core.errors import CheckpointError
from r1pipe.core.formatting import duration, number, percent
from r1pipe.core.paths import RunFolder
from r1pipe.runs import reward_model_quality as judges
from r1pipe.runs.recorded import wrong_type

METRICS = [  # of record.json's "metrics", under the same names
    *("pass_at_1", "pass_at_1_ci", "greedy", "cons_at_k", "k", "problems", "samples", "format_rate"),
    *("language_consistency", "length_mean", "truncation_rate", "general_score", "preference_score"),
    *("refusal_rate", "safe_answer_rate", "by_task", "by_language", "general_by_kind", "strategies"),
    *("reward_models", "forced_judges"),
]
LEAST = ("cons", "len", "seed", "greedy", "pref", "time")  # left out first on a narrow terminal
WIDTH = 100  # of the table, where there is no terminal to ask


def finished_runs(root: Path | str) -> list[RunFolder]:
    """Run folders under `root` with a readable record, oldest first."""
    found = []
    for path in sorted(Path(root).glob("*/record.json")):
        folder = RunFolder(path.parent)
        record = read_record(folder)
        if record.get("stage"):
            found.append((str(record.get("created", "")), folder.run_id, folder))
    return [folder for _, _, folder in sorted(found, key=lambda entry: entry[:2])]


def read_json(path: Path) -> dict:
    """The file's JSON object (NaN as None); {} when it is missing, broken or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_record(folder: RunFolder) -> dict:
    """The run's record; {} where it is missing, or not what a record is."""
    record = read_json(folder.record)
    return {} if wrong_type(record) else record


def choose(root: Path | str, runs: Sequence[str] | None, pipeline: str | None) -> list[RunFolder]:
    """The runs to compare: `runs` (ids or folders) as given, else the newest finished of each stage and seed.

    Raises CheckpointError for a run that does not exist or has not finished.
    """
    if runs:
        return [_named_run(Path(root), name) for name in runs]
    newest: dict[tuple, RunFolder] = {}
    for folder in finished_runs(root):
        record = read_record(folder)
        if pipeline is None or record.get("pipeline") == pipeline:
            newest[record["stage"], record.get("seed")] = folder
    return sorted(newest.values(), key=_order)


def _named_run(root: Path, name: str) -> RunFolder:
    for folder in (RunFolder(root / name), RunFolder(name)):
        if folder.record.exists():
            if not read_record(folder):
                raise CheckpointError(f"{folder.record} cannot be read; make the run again")
            return folder
        if folder.config.exists():
            raise CheckpointError(f"run {name} has not finished: {folder.record} is missing")
    known = [folder.run_id for folder in finished_runs(root)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"{len(known)} finished runs are there"
    raise CheckpointError(f"no run {name} under {root}; {hint}")


def _order(folder: RunFolder) -> tuple:
    """The recipe's stages in their order, then its controls, then anything else."""
    record, config = read_record(folder), read_json(folder.config)
    recipe = config.get("recipe") or {}
    names = [*(recipe.get("stages") or []), *(recipe.get("controls") or [])]
    stage = record.get("stage", "")
    return (names.index(stage) if stage in names else len(names), stage, record.get("seed") or 0)


def row(folder: RunFolder) -> dict:
    """One finished run as a row; a value that its record lacks is None."""
    record, config = read_record(folder), read_json(folder.config)
    metrics = record.get("metrics") or {}
    control = record.get("stage") in ((config.get("recipe") or {}).get("controls") or [])
    return {
        "stage": record.get("stage"),
        "seed": record.get("seed"),
        **{name: metrics.get(name) for name in METRICS},
        "wall_s": record.get("wall_s"),
        "run_id": record.get("run_id") or folder.run_id,
        "run_dir": str(folder.path.resolve()),
        "control": control,
    }


def rows(root: Path | str, runs: Sequence[str] | None = None, pipeline: str | None = None) -> list[dict]:
    """Rows of the table, in the recipe's order; see `choose` for which runs and which error."""
    return [row(folder) for folder in choose(root, runs, pipeline)]


def accuracy(one: dict) -> str:
    """pass@1 with its interval: `79.0 77-81`."""
    ci = one.get("pass_at_1_ci")
    interval = f" {100 * ci[0]:.0f}-{100 * ci[1]:.0f}" if ci and one.get("pass_at_1") is not None else ""
    return percent(one.get("pass_at_1")) + interval


COLUMNS: dict[str, Callable[[dict], str]] = {
    "seed": lambda one: number(one.get("seed")),
    "pass@1 (95%)": accuracy,
    "greedy": lambda one: percent(one.get("greedy")),
    "cons": lambda one: percent(one.get("cons_at_k")),
    "format": lambda one: percent(one.get("format_rate")),
    "lang": lambda one: percent(one.get("language_consistency")),
    "len": lambda one: number(one.get("length_mean")),
    "cut": lambda one: percent(one.get("truncation_rate")),
    "general": lambda one: percent(one.get("general_score")),
    "pref": lambda one: percent(one.get("preference_score")),
    "time": lambda one: duration(one.get("wall_s")),
}


def _table(table_rows: list[dict], left_out: Sequence[str]) -> Table:
    columns = {name: value for name, value in COLUMNS.items() if name not in left_out}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    told = table_rows[0]["control"]  # nothing but controls needs no heading
    for one in table_rows:
        if one["control"] and not told:
            table.add_row("controls", style="italic dim")
            told = True
        values = [value(one) for value in columns.values()]
        table.add_row(str(one["stage"]), *values, style="dim" if one["control"] else None)
    return table


def _width(table: Table, console: Console) -> int:
    """Columns that the table would fill if it had the room."""
    return console.measure(table, options=console.options.update(max_width=1000)).maximum


def show(table_rows: list[dict], console: Console | None = None) -> None:
    """Prints the table of stages: the recipe's first, its controls after them. Fits in 100 columns.

    Without a terminal nothing is left out; a narrow terminal loses the columns in `LEAST`, and says so.
    """
    table_rows = sorted(table_rows, key=lambda one: one["control"])
    console = console or Console()
    if not console.is_terminal and console.width < WIDTH:
        console = Console(file=console.file, width=WIDTH, color_system=None)
    if not table_rows:
        console.print("No finished run yet.")
        return
    left_out: list[str] = []
    table = _table(table_rows, left_out)
    while _width(table, console) > console.width and len(left_out) < len(LEAST):
        left_out.append(LEAST[len(left_out)])
        table = _table(table_rows, left_out)
    console.print(table)
    if left_out:
        console.print(Text(f"a wider terminal shows: {', '.join(left_out)}", style="dim"))
    for one in table_rows:
        if one.get("samples") and one.get("problems"):
            counts = f"{one['samples']:,} samples of {one['problems']:,} held-out problems"
            console.print(Text(f"pass@1: mean over {counts}; shares in %, len in tokens", style="dim"))
            break
    for line in reward_model_lines(table_rows):
        console.print(Text(line, style="dim"))


def reward_model_lines(table_rows: list[dict]) -> Iterator[str]:
    """How each reward model was judged, and which weak ones a stage was made to use."""
    for one in table_rows:
        whose = f"{one['stage']}, seed {one['seed']}"
        for kind, measured in (one.get("reward_models") or {}).items():
            yield f"{whose}, {judges.told(kind, measured)}"
        for weakness in one.get("forced_judges") or ():
            yield f"{whose}, used a weak reward model: {weakness}"


def as_json(table_rows: list[dict]) -> str:
    """The rows as a JSON list, for scripts."""
    return json.dumps(table_rows, ensure_ascii=False, indent=2)
