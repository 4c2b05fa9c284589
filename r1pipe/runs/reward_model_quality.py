"""The reward models' standing: what was measured of each on held-out examples, and which are too weak to use.

stages/reward_model.py leaves the numbers beside each model's weights; both wings read them here. A weak judge
is refused before the job starts: preference rewards are hacked the sooner, the less they know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from r1pipe.config import ParentRef, PreferenceConfig, RLConfig, RunConfig
from r1pipe.core.errors import CheckpointError
from r1pipe.core.formatting import number, percent
from r1pipe.runs.files import read_object
from r1pipe.runs.record import checked

HELPFUL, HARMLESS = "helpful", "harmless"
KINDS = (HELPFUL, HARMLESS)
STAGE = "reward_model"  # the stage that makes them
QUALITY = "quality.json"  # in a finished model's folder
FORCE = "stage.preference.force=true"


Quality = dict[str, float | None]
_QUALITY = TypeAdapter(Quality)


@dataclass(frozen=True)
class Measure:
    """One number that a model is judged by, and the key of `stage.preference` that holds its bound."""

    name: str
    of: str  # for messages: of what
    key: str
    at_least: bool  # else: at most, whatever the sign


LENGTH = Measure(
    "length_correlation", "correlation with the response's length", "max_length_correlation", False
)
MEASURES = {
    HELPFUL: (Measure("accuracy", "share of held-out pairs in order", "min_accuracy", True), LENGTH),
    HARMLESS: (Measure("auc", "area under the ROC curve", "min_auc", True), LENGTH),
}


def quality_of(checkpoint: Path) -> dict[str, Quality]:
    """What stages/reward_model.py measured of each finished model of a checkpoint. Raises CheckpointError."""
    paths = {kind: checkpoint / kind / QUALITY for kind in KINDS}
    return {kind: checked(_QUALITY, read_object(path), path) for kind, path in paths.items() if path.exists()}


def kinds_asked(preference: PreferenceConfig) -> list[str]:
    """The kinds whose reward weighs something."""
    weights = zip(KINDS, (preference.helpful_weight, preference.harmless_weight), strict=True)
    return [kind for kind, weight in weights if weight]


def shortfalls(
    kind: str, measured: Mapping[str, Any], preference: PreferenceConfig, margin: float = 0.0
) -> list[str]:
    """What is beyond the bounds of `stage.preference`, drawn tighter by `margin`: value, bound and key."""
    found = []
    for measure in MEASURES[kind]:
        value, bound = measured.get(measure.name), getattr(preference, measure.key)
        if not _within(value, bound, measure, margin):
            shown = "unknown" if value is None else f"{value:.3g}"
            beyond = "below" if measure.at_least else "beyond"
            found.append(f"{kind} {measure.of} {shown}, {beyond} stage.preference.{measure.key}={bound:g}")
    return found


def _within(value: float | None, bound: float, measure: Measure, margin: float) -> bool:
    """What is unknown is not good enough, but for a correlation: then scores or lengths are all the same."""
    if value is None:
        return not measure.at_least
    return value >= bound + margin if measure.at_least else abs(value) <= bound - margin  # never for NaN


def absent(config: RunConfig) -> list[str]:
    """The kinds of reward models that the stage would ask and its checkpoint lacks: their data had none."""
    preference, checkpoint = _asked(config)
    if preference is None:
        return []
    return [kind for kind in kinds_asked(preference) if not (checkpoint / kind).is_dir()]


def _asked(config: RunConfig) -> tuple[PreferenceConfig | None, Path]:
    """How a stage asks reward models, None where it does not, and the checkpoint that they lie in."""
    stage, parent = config.stage, config.reads_from.get(STAGE)
    if not isinstance(stage, RLConfig) or parent is None:
        return None, Path()
    return stage.preference, Path(parent.checkpoint)


def weaknesses(config: RunConfig) -> list[str]:
    """What speaks against the reward models that the stage would ask; one without a standing counts, too."""
    preference, checkpoint = _asked(config)
    if preference is None:
        return []
    measured, found = quality_of(checkpoint), []
    for kind in kinds_asked(preference):
        if kind in measured:
            found += shortfalls(kind, measured[kind], preference)
        elif (checkpoint / kind).is_dir():
            found.append(f"{kind} was never judged ({checkpoint / kind / QUALITY} is missing)")
    return found


def check_quality(config: RunConfig) -> list[str]:
    """The weaknesses that `stage.preference.force` lets pass.

    Raises CheckpointError where it does not, and where a model that is to be asked is not there.
    """
    found = weaknesses(config)
    stage = config.stage
    if missing := absent(config):
        raise CheckpointError(
            f"{made_by(config.reads_from[STAGE])} has no {missing[0]} model; train it on data that has "
            f"examples (r1pipe run stage={STAGE}), or go without it: stage.preference.{missing[0]}_weight=0"
        )
    if found and isinstance(stage, RLConfig) and stage.preference and not stage.preference.force:
        raise CheckpointError(
            f"weak reward models in {made_by(config.reads_from[STAGE])}: {'; '.join(found)}; train them on "
            f"more or better data (r1pipe run stage={STAGE}), or use them all the same with {FORCE}"
        )
    return found


def made_by(parent: ParentRef) -> str:
    return parent.run_id or parent.checkpoint


def told(kind: str, measured: Mapping[str, Any]) -> str:
    """A model's standing in a few words: `helpful: 82.3% of 300 pairs in order, length r +0.12`."""
    accuracy, area, length = (measured.get(name) for name in ("accuracy", "auc", "length_correlation"))
    if kind == HELPFUL:
        main = f"{percent(accuracy)}% of {number(measured.get('pairs'))} pairs in order"
    else:
        shown = "unknown" if area is None else f"{area:.3f}"
        main = f"area under the curve {shown} on {number(measured.get('labels'))} labels"
    return f"{kind}: {main}" + ("" if length is None else f", length r {length:+.2f}")
