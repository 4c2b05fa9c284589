"""The terminal's panel of a reinforcement learning step: its metrics, and one of its completions.

The job writes the metrics into metrics.jsonl and the completion into progress.jsonl, once a step.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.text import Text

from r1pipe.core.formatting import duration, number, percent

GOOD, BAD = "green", "red"
LABEL = 10  # columns of a line's name
GAP = "   "  # between two figures of a line
OTHER_LINES = 11  # lines of the screen that are neither metrics nor the completion's text
MIN_LINES, MAX_LINES = 3, 16  # of the completion

Metrics = dict[str, float]


def colour(advantage: float | None) -> str:
    """The style of a completion: green where it did better than its group, red where worse."""
    return GOOD if advantage and advantage > 0 else BAD if advantage and advantage < 0 else ""


def mask_controls(text: str) -> str:
    """A model's text for a terminal: characters that move the cursor or turn the writing become `�`."""
    return "".join("�" if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c for c in text)


def signed(value: float | None) -> str:
    """An advantage: +0.94, -1.2, 0; `-` when unknown."""
    return ("+" if value and value > 0 else "") + number(value)


def lines_of(metrics: Metrics) -> dict[str, list[str]]:
    """The metrics of a step (docs/metrics.md) as lines of figures; what was not logged is left out."""

    def value(label: str, name: str) -> str:
        return f"{label} {number(metrics[name])}".strip() if name in metrics else ""

    def share(label: str, name: str) -> str:
        return f"{label} {number(100 * metrics[name])}%" if name in metrics else ""

    def deviation(name: str) -> str:
        return f" ± {number(metrics[name])}" if name in metrics else ""

    def bounds(least: str, greatest: str) -> str:
        if least not in metrics or greatest not in metrics:
            return ""
        return f" ({number(metrics[least])} to {number(metrics[greatest])})"

    def ratio(name: str) -> str:
        return value("ratio", f"{name}/mean") + bounds(f"{name}/min", f"{name}/max")

    length = value("", "completions/mean_length")
    lines = {
        "reward": [
            value("", "reward") + deviation("reward_std"),
            *(value(name.split("/")[1], name) for name in metrics if re.match(r"rewards/.*/mean$", name)),
            share("zero variance", "frac_reward_zero_std"),
            share("failed", "frac_reward_failed") if metrics.get("frac_reward_failed") else "",
        ],
        "length": [
            length + bounds("completions/min_length", "completions/max_length"),
            share("clipped", "completions/clipped_ratio"),
            share("repetition", "completions/repetition"),
        ],
        "policy": [
            value("KL", "kl"),
            value("entropy", "entropy"),
            share("clip ratio low", "clip_ratio/low_mean"),
            share("high", "clip_ratio/high_mean"),
            ratio("importance_ratio"),
        ],
        "sampler": [
            value("logprob gap", "sampling/sampling_logp_difference/mean"),
            ratio("sampling/importance_sampling_ratio"),
        ],
        "tokens/s": [
            value("step", "tokens_per_s"),
            value("sampling", "sampling/tokens_per_s"),
            value("update", "train/tokens_per_s"),
        ],
        "time": [
            f"{name.removeprefix('time/').removesuffix('_s')} {duration(seconds)}"
            for name, seconds in metrics.items()
            if name.startswith("time/")
        ],
    }
    logged = {label: [figure for figure in figures if figure] for label, figures in lines.items()}
    return {label: figures for label, figures in logged.items() if figures}


def wrap_figures(figures: Iterable[str], width: int) -> Iterator[str]:
    """Lines of as many figures as fit; a figure is broken only where it does not fit alone."""
    line = ""
    for figure in figures:
        longer = f"{line}{GAP}{figure}" if line else figure
        if line and cell_len(longer) > width:
            yield line
            longer = figure
        line = longer
    yield line


def cut(lines: Sequence[Text], most: int) -> list[Text]:
    """The first and the last lines, which hold the answer, and one that counts those in between."""
    if len(lines) <= most:
        return list(lines)
    last = (most - 1) // 2
    first = most - 1 - last
    left_out = Text(f"… {len(lines) - most + 1:,} lines …", "dim")
    return [*lines[:first], left_out, *lines[len(lines) - last :]]


class Step:
    """The newest step of a reinforcement learning run, as a panel."""

    def __init__(self, stage: str):
        self.stage = stage
        self.metrics: dict = {}
        self.sample: dict = {}
        self.held_out = ""  # the newest short evaluation: not every step has one

    def update(self, row: dict) -> None:
        """Take a line of metrics.jsonl; those of supervised stages have no reward, and are not shown."""
        if not isinstance(row.get("reward"), int | float):
            return
        self.metrics = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if "eval/pass_at_1" in self.metrics:
            accuracy = percent(self.metrics["eval/pass_at_1"])
            self.held_out = f"pass@1 {accuracy}% (step {self.metrics.get('step', 0):,})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.metrics:
            return
        width = options.max_width - 4  # the frame and a space on either side
        lines = lines_of(self.metrics)
        if self.held_out:
            lines["held out"] = [self.held_out]
        body = [
            Text.assemble((f"{label if not i else '':<{LABEL}}", "dim"), line, no_wrap=True)
            for label, figures in lines.items()
            for i, line in enumerate(wrap_figures(figures, width - LABEL))
        ]
        if self.sample:
            sample, advantage = self.sample, self.sample.get("advantage")
            style = colour(advantage)
            facts = [
                str(sample.get("task", "")),
                f"reward {number(sample.get('reward'))}",
                f"advantage {signed(advantage)}",
            ]
            if sample.get("truncated"):
                facts.append("clipped")
            question = mask_controls(str(sample.get("question", "")))
            completion = Text(mask_controls(str(sample.get("completion", ""))).expandtabs(4), style)
            wrapped = list(completion.wrap(console, width, overflow="fold"))
            free = console.height - len(body) - OTHER_LINES
            body += [
                Text(),
                Text.assemble(("sample".ljust(LABEL), "dim"), (GAP.join(facts), style or "bold")),
                Text(question, "italic", no_wrap=True, overflow="ellipsis"),
                *cut(wrapped, max(MIN_LINES, min(MAX_LINES, free))),
            ]
        title = Text.assemble((self.stage, "bold"), f" step {self.metrics.get('step', 0):,}")
        yield Panel(
            Group(*body), title=title, title_align="left", border_style="dim", width=options.max_width
        )
