"""The story's charts: curves of several stages in one panel, and shares as areas."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from r1pipe.cli.report.plots import HUES, PAGE, SERIES, Panel
from r1pipe.core.formatting import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOUR, THREE = (2.9, 1.95), (3.7, 2.3)  # inches, of charts that stand four or three in a row
AROUND = 5  # steps that a mean is of, where the values of single steps would hide where a curve goes


@dataclass(frozen=True)
class Curve:
    """Values by step, or by anything else."""

    label: str
    color: int  # of SERIES
    steps: list[int]
    values: list[float]
    dashed: bool = False
    faint: bool = False  # of a further seed

    @property
    def is_long(self) -> bool:
        return len(self.steps) > 4 * AROUND


def curve_panel(title: str, unit: str, curves: Sequence[Curve], note: str, log: bool = False) -> Panel | None:
    """None without curves. `log`: the x axis is of tokens, and logarithmic."""
    if not curves:
        return None

    def draw(axes: "Axes") -> None:
        for curve in curves:
            look: dict[str, Any] = {
                "color": SERIES[curve.color],
                "linestyle": (0, (3, 2)) if curve.dashed else "-",
            }
            shown, marker = curve.values, "o" if len(curve.steps) <= 12 else None
            if curve.is_long and not log:
                axes.plot(curve.steps, shown, alpha=0.15 if curve.faint else 0.35, linewidth=0.8, **look)
                shown = running_mean(shown)
            axes.plot(
                curve.steps, shown, alpha=0.4 if curve.faint else 1.0, marker=marker, markersize=3, **look
            )
        if log:
            _token_axis(axes, max(max(curve.steps) for curve in curves))
        axes.set_xlabel("tokens" if log else "step")
        if unit == "%":
            axes.set_ylim(bottom=0)

    written = percent if unit == "%" else number
    told = [
        f"{curve.label} from {written(curve.values[0])} to {written(curve.values[-1])}"
        for curve in curves
        if not curve.faint
    ]
    labels = {curve.label: curve.color + 1 for curve in curves if not curve.dashed and not curve.faint}
    summary = f"{title}, {unit}: {'; '.join(told)}"
    if any(curve.is_long for curve in curves) and not log:
        note += f"; thick: mean of {AROUND} steps"
    return Panel(title, draw, unit, THREE if log else FOUR, labels=labels, note=note, summary=summary)


def running_mean(values: Sequence[float]) -> list[float]:
    """At each place the mean of AROUND values, or of those that there are."""
    half = AROUND // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _token_axis(axes: "Axes", most: int) -> None:
    """16, 32, 64 ... up to the longest that is allowed."""
    ticks = [2**power for power in range(4, int(math.log2(most)) + 1)]
    kept = ticks[:: 1 + len(ticks) // 8]
    axes.set_xscale("log", base=2)
    axes.set_xticks(kept, [f"{tick:,}" for tick in kept])
    axes.minorticks_off()


def areas_panel(title: str, steps: Sequence[int], shares: Mapping[str, Sequence[float]]) -> Panel:
    """Shares by step, one upon the other, the first at the bottom."""
    labels = {label: n % HUES + 1 for n, label in enumerate(shares)}

    def draw(axes: "Axes") -> None:
        colors = [SERIES[n - 1] for n in labels.values()]
        axes.stackplot(steps, *shares.values(), colors=colors, edgecolor=PAGE, linewidth=0.6)
        axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(0, 1)
        axes.set_xlabel("step")

    told = [f"{name} from {percent(values[0])} to {percent(values[-1])}" for name, values in shares.items()]
    summary = f"{title}, %: {'; '.join(told)}"
    return Panel(title, draw, "% of responses", THREE, labels=labels, summary=summary)
