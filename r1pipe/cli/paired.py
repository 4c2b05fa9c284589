"""`r1pipe compare A B --paired`: two evaluations of the same problems, on the screen."""

import json
from pathlib import Path

from rich.console import Console
from rich.text import Text

from r1pipe.core.errors import ConfigError
from r1pipe.core.formatting import percent
from r1pipe.runs import paired, results
from r1pipe.runs.paired import PairedComparison, PairedProblem
from r1pipe.runs.results import StoredRun

LISTED = 10  # problems that are shown of each side; --json has all
WIDTH = 70  # characters of a question


def compare(root: Path | str, names: list[str], pipeline: str | None, as_json: bool) -> None:
    """Raises ConfigError unless two runs are named, and CheckpointError where they cannot be compared."""
    if len(names) != 2:
        raise ConfigError(f"--paired compares two runs, and {len(names)} are named; give two")
    a, b = (_newest(Path(root), name, pipeline) for name in names)
    found = paired.compare(a, b)
    if as_json:
        print(json.dumps(found.as_object(), ensure_ascii=False, indent=2))
    else:
        show(found)


def _newest(root: Path, name: str, pipeline: str | None) -> StoredRun:
    """The run of this name; of a stage's, the newest."""
    return results.named(root, name, pipeline)[-1]


def show(found: PairedComparison, console: Console | None = None) -> None:
    console = console or Console()
    values = found.as_object()
    for side in ("a", "b"):
        console.print(Text(f"{side.upper()}  {values[side]['run_id']}: {percent(found.mean(side))}%"))
    interval = found.interval
    surely = "no interval: all problems differ alike"
    if interval is not None:
        low, high = (_points(bound) for bound in interval)
        surely = f"95% interval {low} to {high} ({paired.METHOD})"
    console.print(Text(f"A - B: {_points(found.mean('difference'))} points, {surely}"))
    counts = f"A is better on {values['wins']} of {values['problems']} problems, B on {values['losses']}; "
    console.print(Text(f"{counts}alike on {values['ties']}"))
    if found.unscored:
        console.print(Text(f"left out: {found.unscored} problems without a verdict in one of the two"))
    for note in found.notes:
        console.print(Text(f"note: the evaluations differ in {note}", style="dim"))
    for title, pairs in (("A won", found.won), ("A lost", found.lost)):
        for line in _lines(title, pairs):
            console.print(Text(line), no_wrap=True, crop=False, overflow="ignore")


def _lines(title: str, pairs: list[PairedProblem]) -> list[str]:
    shown = [
        f"  {percent(pair.a):>5}% {percent(pair.b):>5}%  {pair.prompt_id}  "
        f"{' '.join(pair.question.split())[:WIDTH]}"
        for pair in pairs[:LISTED]
    ]
    more = [f"  and {len(pairs) - LISTED} more: --json lists all"] if len(pairs) > LISTED else []
    return [f"{title} (A, B):", *shown, *more] if pairs else []


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
