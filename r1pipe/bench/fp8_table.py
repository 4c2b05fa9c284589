"""A training step in FP8 beside the same in BF16, as a table and a line, and what it is judged by."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from r1pipe.bench.arithmetic import speedup
from r1pipe.bench.config import FP8Step
from r1pipe.bench.referee import Result
from r1pipe.bench.table import words


def fp8_table(step: FP8Step, bf16: Result, fp8: Result) -> list[RenderableType]:
    """What two contestants did that took the same steps on the same data; and where FP8's time goes."""
    title = f"{fp8.model}, {words(step.case)}: FP8 beside BF16, {step.steps + 1} steps each on the same data"
    table = Table(title=title, title_justify="left")
    table.add_column("setting")
    for heading in ("s", "tokens/s", "memory MiB", "FP8 is faster by", "loss", "apart by"):
        table.add_column(heading, justify="right")
    table.add_column("judged")
    ratio, apart = speedup(fp8.seconds, bf16.seconds), apart_by(bf16, fp8)
    for result in (bf16, fp8):
        figures = [f"{result.seconds:.3g}", f"{step.case.tokens / result.seconds:,.0f}"]
        figures += [f"{result.memory / 2**20:,.0f}"]
        compared = ["", f"{result.told['loss']:.5f}", "", ""]
        if result is fp8:
            compared = [f"{ratio:.2f}", compared[1], f"{apart:.3%}", judgement(step, ratio, apart)]
        table.add_row(str(result.setting), *figures, *compared)
    told = ", ".join(f"{kind} {share:.0%}" for kind, share in fp8.told["shares"].items())
    return [table, Text(f"of an FP8 step's time: {told}\n")]


def apart_by(bf16: Result, fp8: Result) -> float:
    """How far FP8's last loss is from BF16's, relatively."""
    return abs(fp8.told["loss"] - bf16.told["loss"]) / abs(bf16.told["loss"])


def judgement(step: FP8Step, ratio: float, apart: float) -> str:
    """Whether FP8 is as much faster as it must and should be, and whether it learns the same."""
    floor, goal = step.case.floors.get("bf16"), step.case.goals.get("bf16")
    said = []
    if goal is not None and ratio >= goal:
        said.append(f"goal {goal:g} reached")
    elif floor is not None:
        said.append(f"floor {floor:g} {'reached' if ratio >= floor else 'MISSED'}")
    said.append(
        f"loss within {step.loss:.2%}" if apart <= step.loss else f"LOSS MORE THAN {step.loss:.2%} APART"
    )
    return ", ".join(said)
