"""What `r1pipe doctor` found: a verdict with the measured value and the remedy, as a table or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

PASS, WARN, FAIL = "pass", "warn", "fail"
ORDER = (PASS, WARN, FAIL)  # from good to bad
COLOURS = {PASS: "green", WARN: "yellow", FAIL: "red"}
WIDTH = 140  # of the table, where there is no terminal to ask


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str
    status: str  # PASS, WARN or FAIL
    value: str  # what was measured
    remedy: str = ""  # what to do about it; "" where nothing is to be done


def failed(found: Sequence[Finding]) -> bool:
    return any(finding.status == FAIL for finding in found)


def as_json(stage: str, seconds: float, found: Sequence[Finding]) -> str:
    content = {"stage": stage, "seconds": round(seconds, 1), "failed": failed(found)}
    return json.dumps(content | {"checks": [asdict(one) for one in found]}, ensure_ascii=False, indent=2)


def show(stage: str, seconds: float, found: Sequence[Finding], console: Console | None = None) -> None:
    """Print the table, and below it the counts."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, color_system=None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "verdict", "measured", "remedy"):
        table.add_column(column, overflow="fold")
    for one in found:
        # plain texts: a path or a message may hold what rich takes for markup
        table.add_row(
            Text(one.name), Text(one.status, COLOURS[one.status]), Text(one.value), Text(one.remedy)
        )
    console.print(table)
    counts = {status: sum(one.status == status for one in found) for status in (PASS, WARN, FAIL)}
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(Text(f"{stage}: {told}, in {seconds:.0f} s", style="dim"))
