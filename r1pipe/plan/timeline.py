"""What the ranks of a pipeline did when in one step, as they logged it, beside what formulas say of it.

Sample, timeline.json of a run folder; a pass is (kind, part, micro-batch, begin, end), in seconds:
{"schedule": "1f1b", "ranks": [[["F", 0, 0, 0.0, 0.1], ["B", 0, 0, 0.3, 0.5]], [["F", 1, 0, 0.1, 0.2]]]}

Kinds: F forward, B backward, which zbv and dualpipev may do in two, I for inputs and W for weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from r1pipe.core.errors import ConfigError

FORWARD, BACKWARD, INPUTS, WEIGHTS = "F", "B", "I", "W"
COLOURS = {FORWARD: "#4477aa", BACKWARD: "#cc6677", INPUTS: "#ddaa33", WEIGHTS: "#228833"}
ROW, LEFT, WIDTH = 26, 64, 1080  # of a picture, in pixels


@dataclass(frozen=True)
class Passed:
    """One pass of a part over a micro-batch; seconds from the step's beginning."""

    kind: str
    part: int
    micro: int
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline."""

    schedule: str
    ranks: list[list[Passed]]

    @property
    def parts(self) -> int:
        return 1 + max(one.part for passes in self.ranks for one in passes)

    @property
    def span(self) -> float:
        """Seconds from the first pass of all ranks to the last."""
        every = [one for passes in self.ranks for one in passes]
        return max(one.end for one in every) - min(one.begin for one in every)

    def bubble(self) -> float:
        """Seconds that a rank has waited, mean over ranks."""
        busy = sum(one.end - one.begin for passes in self.ranks for one in passes)
        return self.span - busy / len(self.ranks)

    def mean(self, *kinds: str) -> float:
        """Seconds of a part's passes of these kinds for one micro-batch, together; 0 without any."""
        found = [one for passes in self.ranks for one in passes if one.kind in kinds]
        pairs = {(one.part, one.micro) for one in found}
        return sum(one.end - one.begin for one in found) / max(1, len(pairs))

    def formula(self) -> float:
        """Seconds of bubble by the schedule's formula, from the mean times of its passes.

        1f1b: (R-1)(F+B). dualpipev, whose R ranks have two parts each: (R-1)(F+B-2W), as ZB1P, since a
        forward and a backward pass take turns here and hand on at once; V3's table 2 has F&B+B-3W, of pairs
        that overlap. zbv: (R-1) times the longest of F, I and W, by which one rank begins after another; the
        schedule's authors leave that out of their zero (arXiv 2401.10241).
        """
        forward, backward = self.mean(FORWARD), self.mean(BACKWARD, INPUTS, WEIGHTS)
        inputs, weights = self.mean(INPUTS), self.mean(WEIGHTS)
        of_each = {
            "1f1b": forward + backward,
            "dualpipev": forward + backward - 2 * weights,
            "zbv": max(forward, inputs, weights),
        }
        return (len(self.ranks) - 1) * max(0.0, of_each[self.schedule])


def read(path: Path) -> Timeline:
    """Raises ConfigError where the file is no timeline."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ranks = [[Passed(*one) for one in passes] for passes in content["ranks"]]
        found = Timeline(content["schedule"], ranks)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: a run with engine.pipeline=2 or more writes it with each checkpoint"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no timeline ({error}); let the run write it again") from None
    if not ranks or not all(ranks):
        raise ConfigError(f"{path} has a rank without passes; let the run write it again")
    return found


def summary(timeline: Timeline) -> str:
    """One line of figures."""
    bubble, ranks = timeline.bubble(), len(timeline.ranks)
    micros = 1 + max(one.micro for one in timeline.ranks[0])
    return (
        f"{timeline.schedule}, {ranks} ranks, {micros} micro-batches: {timeline.span:.3f} s, of which a rank "
        f"waits {bubble:.3f} s ({bubble / timeline.span:.1%}); by the formula {timeline.formula():.3f} s"
    )


def text(timeline: Timeline, width: int) -> list[str]:
    """A line of letters for each rank: the kinds of its passes, in small letters for its second part."""
    start = min(one.begin for passes in timeline.ranks for one in passes)
    lines = []
    for number, passes in enumerate(timeline.ranks):
        line = ["."] * width
        for one in passes:
            begin, end = (int((t - start) / timeline.span * width) for t in (one.begin, one.end))
            letter = one.kind if one.part < len(timeline.ranks) else one.kind.lower()
            line[begin:end] = letter * (end - begin)
        lines.append(f"{number:>3} {''.join(line)}")
    return lines


def svg(timelines: list[Timeline]) -> str:
    """A picture of timelines one below the other, in one scale."""
    scale = (WIDTH - LEFT) / max(one.span for one in timelines)
    top, shapes = 0, list[str]()
    for timeline in timelines:
        shapes.append(f'<text x="4" y="{top + 18}" class="title">{summary(timeline)}</text>')
        top += ROW
        shapes += _boxes(timeline, top, scale)
        top += ROW * len(timeline.ranks) + ROW // 2
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.in{fill:#fff;font-size:11px}"
    legend = "F forward: blue, B backward: red, I of inputs: yellow, W of weights: green; second: fainter"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + ROW}" width="{WIDTH}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        + "\n".join(shapes)
        + f'<text x="4" y="{top + 12}">{legend}</text></svg>\n'
    )


def _boxes(timeline: Timeline, top: int, scale: float) -> list[str]:
    """The ranks of a timeline: a path of boxes for each kind and part, and the numbers of micro-batches."""
    start = min(one.begin for passes in timeline.ranks for one in passes)
    paths: dict[tuple[str, bool], str] = {}
    words = []
    for number, passes in enumerate(timeline.ranks):
        words.append(f'<text x="4" y="{top + 17}">rank {number}</text>')
        for one in passes:
            left, wide = LEFT + (one.begin - start) * scale, (one.end - one.begin) * scale
            kind = one.kind, one.part >= len(timeline.ranks)
            box = f"M{left:.0f} {top + 1}h{wide:.1f}v{ROW - 3}h-{wide:.1f}z"
            paths[kind] = paths.get(kind, "") + box
            if wide > 14:
                words.append(f'<text x="{left + 2:.0f}" y="{top + 17}" class="in">{one.micro}</text>')
        top += ROW
    fills = [
        f'<path fill="{COLOURS[kind]}" opacity="{0.6 if second else 1}" stroke="#fff" d="{boxes}"/>'
        for (kind, second), boxes in paths.items()
    ]
    return fills + words
