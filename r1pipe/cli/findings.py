"""Findings of `r1pipe doctor`, as a table or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from r1pipe.core.terminal import console_of
from r1pipe.runs.findings import FAIL, ORDER, PASS, WARN, Finding

COLOURS = {PASS: "green", WARN: "yellow", FAIL: "red"}
WIDTH = 140  # of the table without a terminal


def failed(findings: Sequence[Finding]) -> bool:
    return any(finding.status == FAIL for finding in findings)


def as_json(stage: str, seconds: float, findings: Sequence[Finding]) -> str:
    content = {
        "stage": stage,
        "seconds": round(seconds, 1),
        "failed": failed(findings),
        "checks": [asdict(finding) for finding in findings],
    }
    return json.dumps(content, ensure_ascii=False, indent=2)


def show(stage: str, seconds: float, findings: Sequence[Finding]) -> None:
    """Print the table and the counts."""
    console = console_of(WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "verdict", "measured", "remedy"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        status = Text(finding.status, COLOURS[finding.status])
        # Text, because a path or a message may contain rich's markup
        table.add_row(Text(finding.name), status, Text(finding.value), Text(finding.remedy))
    console.print(table)
    statuses = [finding.status for finding in findings]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in ORDER)
    console.print(Text(f"{stage}: {counts}, in {seconds:.0f} s", style="dim"))
