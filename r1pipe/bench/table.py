"""The bench's results as one table, and what they are judged by."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from r1pipe.bench.arithmetic import case_flops, speedup, utilisation
from r1pipe.bench.config import Case, load_model
from r1pipe.bench.referee import Result

WORDS = {"sample": "sampling", "train": "training", "grpo": "GRPO step"}


@dataclass(frozen=True)
class Row:
    """One contestant in one case, in numbers."""

    result: Result
    tokens_per_s: float
    share_of_peak: float  # MFU by the measured matmul in the setting's dtype
    share_of_sheet: float | None  # MFU by the data sheet's peak, where that is known
    ratio: float | None  # how many times faster ours is; None for ours
    judgement: str  # against floor and goal, and memory


def rows_of(results: Sequence[Result], peaks: dict[str, float], sheet: dict[str, float]) -> list[Row]:
    """Rows of one case, ours first. Operations per second by dtype: `peaks` measured, `sheet` promised."""
    ours = next(result for result in results if result.contestant == "ours")
    flops = case_flops(load_model(ours.model), ours.case)
    rows = []
    for result in sorted(results, key=lambda result: result is not ours):
        promised = sheet.get(result.setting.dtype)
        ratio = None if result is ours else speedup(ours.seconds, result.seconds)
        rows.append(
            Row(
                result,
                result.case.tokens / result.seconds,
                utilisation(flops, result.seconds, peaks[result.setting.dtype]),
                utilisation(flops, result.seconds, promised) if promised else None,
                ratio,
                "" if ratio is None else judgement(result, ours, ratio),
            )
        )
    return rows


def judgement(result: Result, ours: Result, ratio: float) -> str:
    """Whether the ratio reaches the case's floor and goal, and whether ours takes no more memory."""
    floor, goal = result.case.floors.get(result.contestant), result.case.goals.get(result.contestant)
    said = []
    if goal is not None and ratio >= goal:
        said.append(f"goal {goal:g} reached")
    elif floor is not None:
        said.append(f"floor {floor:g} {'reached' if ratio >= floor else 'MISSED'}")
    if ours.memory > result.memory:
        said.append("ours takes more memory")
    return ", ".join(said)


def words(case: Case) -> str:
    """A case as the table names it."""
    if case.kind == "train":
        return f"{WORDS[case.kind]} {case.sequences} x {case.prompt}"
    if case.kind == "grpo":
        return f"{WORDS[case.kind]} {case.sequences // case.group} x {case.group} x {case.new}"
    return f"{WORDS[case.kind]} {case.sequences} x {case.prompt}+{case.new}"


def table_of(rows: Sequence[Row], threads: int, peaks: dict[str, float]) -> Table:
    """The whole table, with the measured peaks above it: MFU is a share of these, or of the data sheet's."""
    measured = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in peaks.items())
    table = Table(title=f"{threads} threads; matmul peak: {measured}", title_justify="left")
    for heading in ("model", "case", "contestant", "setting"):
        table.add_column(heading)
    for heading in ("s", "tokens/s", "MFU", "of sheet", "memory MiB", "ours is faster by"):
        table.add_column(heading, justify="right")
    table.add_column("judged")
    for row in rows:
        result = row.result
        table.add_row(
            result.model,
            words(result.case),
            result.contestant,
            str(result.setting),
            f"{result.seconds:.3g}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.share_of_peak:.1%}",
            "" if row.share_of_sheet is None else f"{row.share_of_sheet:.1%}",
            f"{result.memory / 2**20:,.0f}",
            "" if row.ratio is None else f"{row.ratio:.1f}",
            row.judgement,
            end_section=row is rows[-1],
        )
    return table
