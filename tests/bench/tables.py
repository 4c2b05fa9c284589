"""What a measured time is worth, what it is judged by, and the tables that show it. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.config import Case, FP8Step, Shape
from bench.operations import case_flops, roofline
from bench.referee import Result

WORDS = {"sample": "sampling", "train": "training", "grpo": "GRPO step", "update": "GRPO update"}
ALIKE = {"fp32": 0.001, "bf16": 0.05, "fp8": 0.1}  # how far apart gradient norms of the same step may be

# Operations per second of dense bfloat16 products by NVIDIA's data sheets, which give them with sparsity: the
# double. The names are the driver's, of the SXM modules.
DATA_SHEETS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


def data_sheet(gpu: str) -> dict[str, float]:
    """What the data sheet promises by dtype, as far as it is known here."""
    return {"bf16": DATA_SHEETS[gpu]} if gpu in DATA_SHEETS else {}


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: the share of `peak` (operations per second) that the work's own need is."""
    return flops / seconds / peak


def speedup(ours: float, theirs: float) -> float:
    """How many times faster ours is, from seconds for the same work."""
    return theirs / ours


@dataclass(frozen=True)
class Row:
    """One contestant in one case, in numbers."""

    result: Result
    tokens_per_s: float
    share_of_peak: float  # MFU by the measured matmul in the setting's dtype
    share_of_roofline: float  # the least seconds by matmul and memory, over those that it took
    share_of_sheet: float | None  # MFU by the data sheet's peak, where that is known
    ratio: float | None  # how many times faster ours is; None for ours
    judgement: str  # against floor and goal, and memory


def rows_of(
    results: Sequence[Result],
    shape: Shape,
    peaks: dict[str, float],
    bandwidth: float,
    sheet: dict[str, float],
) -> list[Row]:
    """Rows of one case, ours first. Operations per second by dtype: `peaks` measured, `sheet` promised;
    `bandwidth` in bytes per second."""
    ours = next(result for result in results if result.contestant == "ours")
    flops = case_flops(shape, ours.case)
    rows = []
    for result in sorted(results, key=lambda result: result is not ours):
        dtype = result.setting.dtype
        promised, peak = sheet.get(dtype), peaks[dtype]
        ratio = None if result is ours else speedup(ours.seconds, result.seconds)
        rows.append(
            Row(
                result,
                result.case.tokens / result.seconds,
                utilisation(flops, result.seconds, peak),
                roofline(shape, ours.case, dtype, peak, bandwidth) / result.seconds,
                utilisation(flops, result.seconds, promised) if promised else None,
                ratio,
                "" if ratio is None else judgement(result, ours, ratio),
            )
        )
    return rows


def judgement(result: Result, ours: Result, ratio: float) -> str:
    """Whether the ratio reaches the case's floor and goal, and whether ours takes no more memory."""
    floor, goal = result.case.floors.get(result.contestant), result.case.goals.get(result.contestant)
    memory = "ours takes more memory" if ours.memory > result.memory else ""
    return ", ".join(
        filter(None, [reached(ratio, floor, goal), slowed(result, ours), unlike(result, ours), memory])
    )


def slowed(result: Result, ours: Result) -> str:
    """How much longer both take beside busy processes; empty where there were none."""
    if not result.case.busy:
        return ""
    mine, its = ours.seconds / ours.idle, result.seconds / result.idle
    verdict = "no more than theirs" if mine <= its else "MORE THAN THEIRS"
    return f"others slow ours down {mine:.1f} times and theirs {its:.1f}: {verdict}"


def unlike(result: Result, ours: Result) -> str:
    """Whether both took the same step; empty where they reported no gradient norm."""
    norm, mine = result.facts.get("gradient norm"), ours.facts.get("gradient norm")
    if norm is None or mine is None:
        return ""
    most = max(ALIKE[ours.setting.dtype], ALIKE[result.setting.dtype])
    apart = abs(norm - mine) / abs(norm)
    return f"gradients' norms {apart:.2%} apart" + (f", MORE THAN {most:.1%}" if apart > most else "")


def reached(ratio: float, floor: float | None, goal: float | None) -> str:
    """Which of the two a ratio reaches; empty where there is neither."""
    if goal is not None and ratio >= goal:
        return f"goal {goal:g} reached"
    if floor is not None:
        return f"floor {floor:g} {'reached' if ratio >= floor else 'MISSED'}"
    return ""


def words(case: Case) -> str:
    """A case as the table names it."""
    if case.kind == "train":
        return f"{WORDS[case.kind]} {case.sequences} x {case.prompt}" + (", busy" if case.busy else "")
    if case.kind in ("grpo", "update"):
        groups = f"{case.sequences // case.group} x {case.group}"
        return f"{WORDS[case.kind]} {groups} x {'up to ' if case.kind == 'update' else ''}{case.new}"
    return f"{WORDS[case.kind]} {case.sequences} x {case.prompt}+{case.new}"


def new_table(title: str, left: Sequence[str], right: Sequence[str], judged: bool = True) -> Table:
    """An empty table with columns of text, columns of figures and, last, one of judgements."""
    table = Table(title=title, title_justify="left")
    for heading in left:
        table.add_column(heading, no_wrap=heading != "setting", overflow="fold")  # names stay whole
    for heading in right:
        table.add_column(heading, justify="right")
    if judged:
        table.add_column("judged")
    return table


def table_of(rows: Sequence[Row], threads: int, peaks: dict[str, float], bandwidth: float) -> Table:
    """The whole table, with the measured peaks above it: MFU is a share of these, or of the data sheet's, and
    the roofline is made of these and the bandwidth."""
    measured = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in peaks.items())
    figures = ("s", "tokens/s", "MFU", "of sheet", "of roofline", "memory MiB", "ours is faster by")
    title = f"{threads} threads; matmul peak: {measured}; memory {bandwidth / 1e9:,.0f} GB/s"
    table = new_table(title, ("model", "case", "contestant", "setting"), figures)
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
            f"{row.share_of_roofline:.0%}",
            f"{result.memory / 2**20:,.0f}",
            "" if row.ratio is None else f"{row.ratio:.1f}",
            row.judgement,
            end_section=row is rows[-1],
        )
    return table


def fp8_table(step: FP8Step, bf16: Result, fp8: Result) -> list[RenderableType]:
    """Two contestants that took the same steps on the same data, and where FP8's time goes."""
    title = f"{fp8.model}, {words(step.case)}: FP8 beside BF16, {step.steps + 1} steps each on the same data"
    table = new_table(
        title, ["setting"], ("s", "tokens/s", "memory MiB", "FP8 is faster by", "loss", "apart by")
    )
    ratio = speedup(fp8.seconds, bf16.seconds)
    apart = abs(fp8.facts["loss"] - bf16.facts["loss"]) / abs(bf16.facts["loss"])
    for result in (bf16, fp8):
        table.add_row(
            str(result.setting),
            f"{result.seconds:.3g}",
            f"{step.case.tokens / result.seconds:,.0f}",
            f"{result.memory / 2**20:,.0f}",
            f"{ratio:.2f}" if result is fp8 else "",
            f"{result.facts['loss']:.5f}",
            f"{apart:.3%}" if result is fp8 else "",
            fp8_judgement(step, ratio, apart) if result is fp8 else "",
        )
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in fp8.facts["shares"].items())
    return [table, Text(f"of an FP8 step's time: {shares}\n")]


def fp8_judgement(step: FP8Step, ratio: float, apart: float) -> str:
    """Whether FP8 is as much faster as it must and should be, and whether it learns the same."""
    speed = reached(ratio, step.case.floors.get("bf16"), step.case.goals.get("bf16"))
    within, beyond = f"loss within {step.loss:.2%}", f"LOSS MORE THAN {step.loss:.2%} APART"
    return ", ".join(filter(None, [speed, within if apart <= step.loss else beyond]))
