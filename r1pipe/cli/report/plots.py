"""What the report draws: in fixed colours as PNG, and in the page's CSS variables as SVG."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r1pipe.cli.report.load import StageRun
from r1pipe.core.formatting import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours of the page's light theme, as in STYLE. SERIES are six hues and two greys (for controls).
INK, MUTED, LINE, PAGE = "#1c2024", "#6b7280", "#e2e4e8", "#ffffff"
SERIES = ("#2a6bb0", "#d0752a", "#2f8f6b", "#b04a6f", "#7a67b8", "#a48a1e", "#8a8f98", "#c3c7cd")
HUES = 6
CSS_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAGE: "page"} | {
    color: f"s{n}" for n, color in enumerate(SERIES, start=1)
}
STYLE = Path(__file__).parent / "templates" / "plots.mplstyle"
Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Panel:
    """One small chart: its title, what its values are, and how to draw it.

    What its colours mean stands beside the chart, where it covers nothing and a small screen can read it.
    """

    title: str
    draw: Draw
    unit: str = ""
    size: tuple[float, float] = (3.6, 2.2)  # inches; the page scales it to its column
    grid: Literal["both", "x", "y"] = "both"  # lines across "x", "y" or "both"
    labels: dict[str, int] = field(default_factory=dict)  # of what is drawn -> number of its colour, from 1
    note: str = ""  # what it shows, in a few words
    summary: str = ""  # what one sees in it, for who cannot


# --- curves over training


def training_panels(runs: Sequence[StageRun]) -> list[Panel]:
    """Curves of one RL stage (a run per seed); a chart without data is left out."""

    def group(name: str, ending: str = "") -> dict[str, str]:
        """The metrics `name/LABEL` + `ending`, each with its label."""
        metrics = dict.fromkeys(metric for run in runs for line in run.metrics for metric in line)
        return {
            metric: metric.removeprefix(f"{name}/").removesuffix(ending).replace("_", " ")
            for metric in metrics
            if metric.startswith(f"{name}/") and metric.endswith(ending)
        }

    judges = group("truth", "/gap")  # truth/NAME/gap -> NAME
    judged = {f"rewards/{name.split('/')[1]}/mean": f"said: {label}" for name, label in judges.items()}
    truths = ("truth/helpful", "truth/harmless") if judges else ()
    judged |= {name: f"truth: {name.removeprefix('truth/')}" for name in truths}
    charts: list[tuple[str, str, dict[str, str]]] = [  # title, unit, {metric: label}
        ("Accuracy", "%", {"eval/pass_at_1": "held out (dev)", "rewards/accuracy/mean": "training prompts"}),
        ("Reward", "", {"reward": "sum"} | group("rewards", "/mean")),
        ("General answers: what judges say, and the truth", "", judged),
        (
            "Response length",
            "tokens",
            {"completions/mean_length": "mean", "completions/max_length": "longest"},
        ),
        ("Words of reflection", "per response", {"completions/reflections": ""}),
        (
            "Cut off, no signal",
            "%",
            {
                "completions/clipped_ratio": "responses cut off",
                "frac_reward_zero_std": "groups of equal reward",
            },
        ),
        ("Entropy", "nats per token", {"entropy": ""}),
        ("KL to the reference", "nats per token", {"kl": ""}),
        ("Value model (PPO)", "% of variance explained", {"value/explained_variance": ""}),
        ("Format and language", "%", {"rewards/format/mean": "format", "rewards/language/mean": "language"}),
    ]
    panels = []
    for title, unit, metrics in charts:
        known = {name: label for name, label in metrics.items() if any(run.series(name)[0] for run in runs)}
        if known:
            labels = {label: n % HUES + 1 for n, label in enumerate(known.values()) if label}
            seen = told(title, runs, known)
            panels.append(Panel(title, curves(runs, known), unit, labels=labels, summary=seen))
    return panels


def told(title: str, runs: Sequence[StageRun], metrics: dict[str, str]) -> str:
    """From what to what each of the curves goes, in words; of the first run."""
    ends = []
    for name, label in metrics.items():
        _, values = runs[0].series(name)
        if values:
            ends.append(f"{label} from {number(values[0])} to {number(values[-1])}".strip())
    return f"{title}: {'; '.join(ends)}"


def curves(runs: Sequence[StageRun], metrics: dict[str, str]) -> Draw:
    """Each metric's values by step, of every run; `metrics`: name -> label."""

    def draw(axes: "Axes") -> None:
        for n, (name, label) in enumerate(metrics.items()):
            for i, run in enumerate(runs):
                steps, values = run.series(name)
                axes.plot(
                    steps,
                    values,
                    color=SERIES[n % HUES],
                    alpha=1.0 if i == 0 else 0.45,
                    label=label if i == 0 and label else None,
                    marker="o" if len(steps) <= 12 else None,
                    markersize=3,
                )
        axes.set_xlabel("step")

    return draw


# --- stages compared


def accuracy_panel(runs: Sequence[StageRun]) -> Panel | None:
    """pass@1 of every stage with its 95% interval, one mark per seed; controls hollow, below."""
    shown = [run for run in runs if run.row["pass_at_1"] is not None]
    names = list(dict.fromkeys((run.is_control, run.stage) for run in shown))

    def draw(axes: "Axes") -> None:
        for y, (control, stage) in enumerate(names):
            of_stage = [run for run in shown if (run.is_control, run.stage) == (control, stage)]
            color = MUTED if control else SERIES[0]
            for i, run in enumerate(of_stage):
                at, value = y + 0.22 * (i - (len(of_stage) - 1) / 2), run.row["pass_at_1"]
                low, high = run.row["pass_at_1_ci"] or (value, value)
                axes.plot(
                    [low, high], [at, at], color=color, linewidth=2.2, alpha=0.6, solid_capstyle="round"
                )
                face = PAGE if control else color
                axes.plot([value], [at], "o", color=color, markerfacecolor=face, markersize=5.5)
                if i == 0:
                    label = f"{100 * value:.1f}"
                    axes.annotate(
                        label, (high, at), (6, 0), textcoords="offset points", va="center", color=INK
                    )
        labels = [f"{stage} (control)" if control else stage for control, stage in names]
        axes.set_yticks(range(len(names)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.04)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "20", "40", "60", "80", "100"])
        axes.set_xlabel("pass@1 on held-out problems, %, 95% interval")

    told = [
        f"{run.stage} {percent(run.row['pass_at_1'])}"
        for run in shown
        if run.seed == min(r.seed for r in shown)
    ]
    summary = f"pass@1 on held-out problems, in percent: {', '.join(told)}"
    size = (4.6, 0.7 + 0.3 * len(names))
    return Panel("", draw, size=size, grid="x", summary=summary) if names else None


def stage_colors(runs: Sequence[StageRun]) -> dict[str, int]:
    """Which of SERIES each evaluated stage is drawn in."""
    stages = dict.fromkeys((run.is_control, run.stage) for run in runs if run.row["pass_at_1"] is not None)
    recipe = [stage for control, stage in stages if not control]
    controls = [stage for control, stage in stages if control]
    greys = {stage: HUES + n % 2 for n, stage in enumerate(controls)}
    return {stage: n % HUES for n, stage in enumerate(recipe)} | greys


def bars_panel(runs: Sequence[StageRun], key: str, title: str) -> Panel | None:
    """Grouped bars: a group per entry of `row[key]` (tasks, kinds), a bar per stage (mean of its seeds)."""
    colors = stage_colors(runs)
    stages = [stage for stage in colors if any(run.row.get(key) for run in runs if run.stage == stage)]
    entries = list(dict.fromkeys(entry for run in runs for entry in run.row.get(key) or {}))
    width = 0.84 / max(1, len(stages))

    def mean(stage: str, entry: str) -> float:
        """Over the seeds that have a value; NaN, which draws no bar, where none has."""
        scores: list[Any] = [(run.row.get(key) or {}).get(entry) for run in runs if run.stage == stage]
        values = [score.get("pass_at_1") if isinstance(score, dict) else score for score in scores]
        known = [value for value in values if isinstance(value, int | float)]
        return sum(known) / len(known) if known else math.nan

    def draw(axes: "Axes") -> None:
        for n, stage in enumerate(stages):
            at = [i + width * (n - (len(stages) - 1) / 2) for i in range(len(entries))]
            heights = [mean(stage, entry) for entry in entries]
            axes.bar(at, heights, width * 0.86, color=SERIES[colors[stage]])
        axes.set_xticks(range(len(entries)), [entry.replace("_", " ") for entry in entries])
        axes.set_ylim(0, 1)

    def told(entry: str) -> str:
        known = [(stage, mean(stage, entry)) for stage in stages]
        shares = [f"{stage} {percent(share)}" for stage, share in known if not math.isnan(share)]
        return f"{entry.replace('_', ' ')}: {', '.join(shares)}"

    if not entries or not stages:
        return None
    return Panel(
        title, draw, "%", size=(4.2, 2.2), grid="y", summary=f"{title}, %. {'; '.join(map(told, entries))}"
    )


# --- to SVG and PNG


def _draw(axes: "Axes", panel: Panel) -> None:
    panel.draw(axes)
    axes.grid(panel.grid != "y", axis="x")
    axes.grid(panel.grid != "x", axis="y")
    axes.set_ylabel(panel.unit)
    if panel.unit.startswith("%"):
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")


def svg(panel: Panel) -> str:
    """The panel as inline SVG whose colours are the page's CSS variables."""
    from matplotlib import style
    from matplotlib.figure import Figure

    ids = {"svg.hashsalt": panel.title}  # stable, and apart between charts
    with style.context([STYLE, ids]):
        figure = Figure(figsize=panel.size, layout="constrained")
        _draw(figure.add_subplot(), panel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    for color, variable in CSS_VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text


def write_curves(above: Sequence[Panel], below: Sequence[Panel], path: Path) -> None:
    """The README's picture: the report's charts in two rows. Writes nothing where there is none."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in (above, below) if row]
    if not rows:
        return
    with style.context(STYLE):
        figure = Figure(figsize=(12, 3.2 * len(rows)), layout="constrained", facecolor="white")
        for subfigure, panels in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            subfigure.set_facecolor("white")
            for axes, panel in zip(subfigure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
                _draw(axes, panel)
                note = textwrap.wrap(panel.note, 36)
                axes.set_title(panel.title, pad=6 + 11 * len(note))
                above_axes = {"xycoords": "axes fraction", "textcoords": "offset points"}
                axes.annotate("\n".join(note), (0, 1), (0, 4), color=MUTED, fontsize=8, **above_axes)
                keys = [Patch(color=SERIES[n - 1], label=label) for label, n in panel.labels.items()]
                if keys:
                    axes.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
        figure.savefig(path, format="png", dpi=130)
