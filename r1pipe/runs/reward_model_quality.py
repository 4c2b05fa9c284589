"""How good reward models are on held-out examples, and which are too weak to use.

stages/reward_model.py leaves the numbers beside each model's weights. A weak model is refused before the job
starts: policies hack the rewards of weak models sooner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from r1pipe.config import PreferenceConfig, RLConfig, RunConfig
from r1pipe.core.errors import CheckpointError
from r1pipe.core.formatting import number, percent
from r1pipe.runs.files import read_object
from r1pipe.runs.record import checked

HELPFUL, HARMLESS = "helpful", "harmless"
KINDS = (HELPFUL, HARMLESS)
STAGE = "reward_model"  # the stage that trains them
QUALITY = "quality.json"  # in a finished model's folder
FORCE = "stage.preference.force=true"


Quality = dict[str, float | None]
_QUALITY = TypeAdapter(Quality)


@dataclass(frozen=True)
class Measure:
    """A measure of a judge's or reward model's quality, and the key below stage.judge or stage.preference
    with its bound."""

    name: str
    description: str
    key: str
    at_least: bool  # else the absolute value is at most the bound; of a judge unknown is then within


LENGTH = Measure(
    "length_correlation", "correlation with the response's length", "max_length_correlation", False
)
MEASURES = {
    HELPFUL: (Measure("accuracy", "share of held-out pairs in order", "min_accuracy", True), LENGTH),
    HARMLESS: (Measure("auc", "area under the ROC curve", "min_auc", True), LENGTH),
}


def quality_of(checkpoint: Path) -> dict[str, Quality]:
    """Kind -> quality of each finished model of a checkpoint. Raises CheckpointError."""
    paths = {kind: checkpoint / kind / QUALITY for kind in KINDS}
    return {kind: checked(_QUALITY, read_object(path), path) for kind, path in paths.items() if path.exists()}


def requested_kinds(preference: PreferenceConfig) -> list[str]:
    """The kinds whose reward has a weight."""
    weights = {HELPFUL: preference.helpful_weight, HARMLESS: preference.harmless_weight}
    return [kind for kind in KINDS if weights[kind]]


def shortfalls(
    kind: str, quality: Mapping[str, Any], preference: PreferenceConfig, margin: float = 0.0
) -> list[str]:
    """The measures beyond their bounds, which are tightened by `margin`: value, bound and key of each.

    An unknown value is beyond, except a correlation: all scores or all lengths are the same then.
    """
    lines = []
    for measure in MEASURES[kind]:
        value, bound = quality.get(measure.name), getattr(preference, measure.key)
        if value is None:
            is_within = not measure.at_least
        elif measure.at_least:
            is_within = value >= bound + margin
        else:
            is_within = abs(value) <= bound - margin  # False for NaN
        if not is_within:
            shown = "unknown" if value is None else f"{value:.3g}"
            side = "below" if measure.at_least else "beyond"
            key = f"stage.preference.{measure.key}"
            lines.append(f"{kind}: {measure.description} is {shown}, {side} {key}={bound:g}")
    return lines


def check_quality(config: RunConfig) -> list[str]:
    """The shortfalls of the reward models that the stage uses, which `stage.preference.force` accepts.

    Raises CheckpointError where it does not, and where one of these models is missing: its data had no
    examples. A model that was never measured falls short, too.
    """
    stage, parent = config.stage, config.reads_from.get(STAGE)
    if not isinstance(stage, RLConfig) or stage.preference is None or parent is None:
        return []
    checkpoint, made_by = Path(parent.checkpoint), parent.run_id or parent.checkpoint
    kinds = requested_kinds(stage.preference)
    for kind in kinds:
        if not (checkpoint / kind).is_dir():
            raise CheckpointError(
                f"{made_by} has no {kind} model; train it on data that has examples (r1pipe run "
                f"stage={STAGE}), or leave it out: stage.preference.{kind}_weight=0"
            )
    quality, lines = quality_of(checkpoint), []
    for kind in kinds:
        if kind in quality:
            lines += shortfalls(kind, quality[kind], stage.preference)
        else:
            lines.append(f"{kind}: it was never measured ({checkpoint / kind / QUALITY} is missing)")
    if lines and not stage.preference.force:
        raise CheckpointError(
            f"the reward models of {made_by} cannot be relied on: {'; '.join(lines)}; train them on more or "
            f"better data (r1pipe run stage={STAGE}), or use them anyway with {FORCE}"
        )
    return lines


def describe(kind: str, quality: Mapping[str, Any]) -> str:
    """A model's quality in a few words: `helpful: 82.3% of 300 pairs in order, length r +0.12`."""
    auc, length = quality.get("auc"), quality.get("length_correlation")
    if kind == HELPFUL:
        main = f"{percent(quality.get('accuracy'))}% of {number(quality.get('pairs'))} pairs in order"
    else:
        shown = "unknown" if auc is None else f"{auc:.3f}"
        main = f"area under the curve {shown} on {number(quality.get('labels'))} labels"
    return f"{kind}: {main}" + ("" if length is None else f", length r {length:+.2f}")
