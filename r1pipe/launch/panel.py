"""What a terminal shows of a step of reinforcement: its metrics, and one of its completions.

`Step` is drawn anew at every refresh; the job writes the metrics into metrics.jsonl and the completion into
progress.jsonl, once a step.
"""

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
AROUND = 11  # lines of the screen that are neither metrics nor the completion's text
LEAST, MOST = 3, 16  # lines of the completion

Metrics = dict[str, float]


def colour(advantage: float | None) -> str:
    """The style of a completion: green where it did better than its group, red where worse."""
    return GOOD if advantage and advantage > 0 else BAD if advantage and advantage < 0 else ""


def harmless(text: str) -> str:
    """A model's text for a terminal: what could move its cursor, or turn its writing around, becomes `�`."""
    return "".join("�" if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c for c in text)


def signed(value: float | None) -> str:
    """An advantage: +0.94, -1.2, 0; `-` when unknown."""
    return ("+" if value and value > 0 else "") + number(value)


def lines_of(metrics: Metrics) -> dict[str, list[str]]:
    """The metrics of a step (docs/metrics.md) as lines of figures; what was not logged is left out."""
    share = {name: f"{number(100 * value)}%" for name, value in metrics.items()}
    components = {
        name.split("/")[1]: value
        for name, value in metrics.items()
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    failed = metrics.get("frac_reward_failed")
    lines = {
        "reward": [
            _with(metrics, "", "reward", "reward_std"),
            *(f"{name} {number(value)}" for name, value in components.items()),
            _given(share, "zero variance", "frac_reward_zero_std"),
            _given(share, "failed", "frac_reward_failed") if failed else "",
        ],
        "length": [
            _range(
                metrics, "", "completions/mean_length", "completions/min_length", "completions/max_length"
            ),
            _given(share, "clipped", "completions/clipped_ratio"),
            _given(share, "repetition", "completions/repetition"),
        ],
        "policy": [
            _given(metrics, "KL", "kl"),
            _given(metrics, "entropy", "entropy"),
            _given(share, "clip ratio low", "clip_ratio/low_mean"),
            _given(share, "high", "clip_ratio/high_mean"),
            _ratio(metrics, "ratio", "importance_ratio"),
        ],
        "sampler": [
            _given(metrics, "logprob gap", "sampling/sampling_logp_difference/mean"),
            _ratio(metrics, "ratio", "sampling/importance_sampling_ratio"),
        ],
        "tokens/s": [
            _given(metrics, "step", "tokens_per_s"),
            _given(metrics, "sampling", "sampling/tokens_per_s"),
            _given(metrics, "update", "train/tokens_per_s"),
        ],
        "time": [
            f"{name.removeprefix('time/').removesuffix('_s')} {duration(value)}"
            for name, value in metrics.items()
            if name.startswith("time/")
        ],
    }
    return {label: known for label, figures in lines.items() if (known := list(filter(None, figures)))}


def _given(values: dict, label: str, name: str) -> str:
    if name not in values:
        return ""
    value = values[name]
    return f"{label} {value if isinstance(value, str) else number(value)}".strip()


def _with(metrics: Metrics, label: str, mean: str, deviation: str) -> str:
    shown = _given(metrics, label, mean)
    return f"{shown} ± {number(metrics[deviation])}" if shown and deviation in metrics else shown


def _range(metrics: Metrics, label: str, mean: str, least: str, greatest: str) -> str:
    shown = _given(metrics, label, mean)
    if not shown or least not in metrics or greatest not in metrics:
        return shown
    return f"{shown} ({number(metrics[least])} to {number(metrics[greatest])})"


def _ratio(metrics: Metrics, label: str, name: str) -> str:
    return _range(metrics, label, f"{name}/mean", f"{name}/min", f"{name}/max")


def _flow(figures: Iterable[str], width: int) -> Iterator[str]:
    """As many figures a line as fit; one is broken only where it does not fit alone."""
    line = ""
    for figure in figures:
        longer = f"{line}{GAP}{figure}" if line else figure
        if line and cell_len(longer) > width:
            yield line
            longer = figure
        line = longer
    yield line


def cut(lines: Sequence[Text], most: int) -> list[Text]:
    """The first and the last lines, which hold the answer; in place of the others one that counts them."""
    if len(lines) <= most:
        return list(lines)
    last = (most - 1) // 2
    first = most - 1 - last
    left_out = Text(f"… {len(lines) - most + 1:,} lines …", "dim")
    return [*lines[:first], left_out, *lines[len(lines) - last :]]


class Step:
    """The newest step of a run of reinforcement, as a panel."""

    def __init__(self, stage: str):
        self.stage = stage
        self.metrics: dict = {}
        self.sample: dict = {}
        self.held_out = ""  # the newest short evaluation, which is not of every step

    def take(self, row: dict) -> None:
        """A line of metrics.jsonl; those of supervised stages have no reward, and are not shown."""
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
            for i, line in enumerate(_flow(figures, width - LABEL))
        ]
        if self.sample:
            room = console.height - len(body) - AROUND
            body += self._sample(console, width, max(LEAST, min(MOST, room)))
        title = Text.assemble((self.stage, "bold"), f" step {self.metrics.get('step', 0):,}")
        yield Panel(
            Group(*body), title=title, title_align="left", border_style="dim", width=options.max_width
        )

    def _sample(self, console: Console, width: int, most: int) -> list[Text]:
        sample, advantage = self.sample, self.sample.get("advantage")
        style = colour(advantage)
        parts = [
            str(sample.get("task", "")),
            f"reward {number(sample.get('reward'))}",
            f"advantage {signed(advantage)}",
        ]
        parts += ["clipped"] if sample.get("truncated") else []
        head = Text.assemble(("sample".ljust(LABEL), "dim"), (GAP.join(parts), style or "bold"))
        question = Text(
            harmless(str(sample.get("question", ""))), "italic", no_wrap=True, overflow="ellipsis"
        )
        text = Text(harmless(str(sample.get("completion", ""))).expandtabs(4), style)
        wrapped = text.wrap(console, width, overflow="fold")
        return [Text(), head, question, *cut(list(wrapped), most)]
