"""How good generative judges are on held-out examples, and which are too weak to be used.

`r1pipe judge MODEL` leaves the figures in ROOT/judges/ID/quality.json. A judge that was never measured, or
that is beyond a bound of stage.judge, is refused before the job starts: whoever learns from a weak judge
learns its weaknesses.
"""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from r1pipe.config import EvaluateConfig, RejectionConfig, RewardModelConfig, RLConfig, RunConfig
from r1pipe.config.judge import REWARDS, JudgeConfig, prompts_of, version_of
from r1pipe.core.errors import CheckpointError
from r1pipe.runs.files import read_object
from r1pipe.runs.record import checked
from r1pipe.runs.reward_model_quality import Measure

FOLDER, QUALITY = "judges", "quality.json"
FORCE = "stage.judge.force=true"
PAIRWISE, POINTWISE, HARMLESS, REFERENCE = KINDS = ("pairwise", "pointwise", "harmless", "reference")

Figures = dict[str, Any]  # of one kind of question


class Quality(TypedDict):
    """The content of quality.json."""

    judge: dict[str, Any]  # who it is, how much was asked and what it cost
    prompts: str  # version of the prompts
    asked: dict[str, Any]  # stage.judge, as it was measured
    data: dict[str, Any]  # held-out examples: name, hash, split
    created: str  # ISO 8601, UTC
    kinds: dict[str, Figures]


_QUALITY = TypeAdapter(Quality)


_UNREAD = Measure("unread", "share of verdicts that cannot be read", "max_unread", False)
_AGREEMENT = Measure("agreement", "agreement with the labels", "min_agreement", True)
_LENGTH = Measure("length_bias", "taste for the longer answer beyond the labels'", "max_length_bias", False)
MEASURES = {
    PAIRWISE: (
        _AGREEMENT,
        Measure("flips", "share of preferences that flip with the order", "max_flips", False),
        _LENGTH,
        Measure("self_preference", "preference for its own answers", "max_self_preference", False),
        Measure("consistency", "share of verdicts that stay when asked again", "min_consistency", True),
        Measure("obeyed", "share of instructions inside answers that it obeys", "max_obeyed", False),
        _UNREAD,
    ),
    POINTWISE: (_AGREEMENT, _LENGTH, _UNREAD),
    HARMLESS: (Measure("auc", "area under the ROC curve", "min_auc", True), _UNREAD),
    REFERENCE: (Measure("accuracy", "share graded correctly", "min_reference_accuracy", True), _UNREAD),
}
# what makes two measurements of one model two judges
ASKED = ("votes", "max_tokens", "temperature", "top_p")


def judge_of(config: RunConfig) -> JudgeConfig | None:
    """How a stage asks its judge; None where it has none."""
    stage = config.stage
    if isinstance(stage, RLConfig | EvaluateConfig | RejectionConfig | RewardModelConfig):
        return stage.judge if config.judge is not None else None
    return None


def identity(config: RunConfig) -> list[str | None]:
    """Who `judge=` is, as far as is known without asking it."""
    judge = judge_of(config)
    assert judge is not None and config.judge is not None
    version = config.judge_from.hash if config.judge_from else judge.served_name
    named = "checkpoint" if config.judge_from else config.judge.rstrip("/")
    asked = [str(getattr(judge, name)) for name in ASKED]
    return [named, version, version_of(prompts_of(judge.prompts)), *asked]


def folder_of(config: RunConfig) -> Path:
    """Where the judge's measurement is, or will be."""
    digest = hashlib.sha256(repr(identity(config)).encode()).hexdigest()
    return Path(config.root).resolve() / FOLDER / digest[:16]


def quality_of(folder: Path) -> Quality | None:
    """None where the judge was never measured. Raises CheckpointError for a damaged file."""
    path = folder / QUALITY
    return cast(Quality, checked(_QUALITY, read_object(path), path)) if path.exists() else None


def kinds_needed(config: RunConfig) -> list[str]:
    """The kinds of questions that a stage asks its judge, as far as its config tells."""
    stage = config.stage
    if config.judge is None:
        return []
    if isinstance(stage, RLConfig):
        kinds = dict(zip(REWARDS, (POINTWISE, HARMLESS), strict=True))
        return [kind for name, kind in kinds.items() if stage.rewards.weights.get(name)]
    if isinstance(stage, EvaluateConfig):
        assert stage.judge
        return [*stage.judge.rates, *([PAIRWISE] if stage.judge.baseline else [])]
    if isinstance(stage, RewardModelConfig):
        return [PAIRWISE]
    return []  # rejection sampling asks by its prompts, and checks the rest in the job


def shortfalls(kind: str, figures: Mapping[str, Any], judge: JudgeConfig) -> list[str]:
    """The figures of a kind that are beyond their bounds: value, bound and key of each."""
    lines = []
    for measure in MEASURES[kind]:
        value, bound = figures.get(measure.name), getattr(judge, measure.key)
        if value is None:
            within = not measure.at_least
        else:
            within = value >= bound if measure.at_least else abs(value) <= bound
        if not within:
            shown = "unknown" if value is None else f"{value:.3g}"
            side = "below" if measure.at_least else "beyond"
            key = f"stage.judge.{measure.key}"
            lines.append(f"{kind}: {measure.description} is {shown}, {side} {key}={bound:g}")
    return lines


def check_judge(config: RunConfig, kinds: Collection[str] | None = None) -> list[str]:
    """What speaks against using the stage's judge for these kinds of questions (None: those that the config
    tells), and stage.judge.force accepts. Raises CheckpointError where it does not.
    """
    judge = judge_of(config)
    if judge is None:
        return []
    folder = folder_of(config)
    quality = quality_of(folder)
    if quality is None:
        lines = [f"it was never measured as it is to be asked ({folder / QUALITY} is missing)"]
    else:
        lines = []
        for kind in kinds_needed(config) if kinds is None else kinds:
            if kind in quality["kinds"]:
                lines += shortfalls(kind, quality["kinds"][kind], judge)
            else:
                lines.append(f"{kind}: it was not measured, as the data had no such examples")
    if lines and not judge.force:
        raise CheckpointError(
            f"judge={config.judge} cannot be relied on: {'; '.join(lines)}; measure it with the same "
            f"stage.judge keys (r1pipe judge {config.judge} data=NAME), take another judge, or use it anyway "
            f"with {FORCE}"
        )
    return lines


def describe(kind: str, figures: Mapping[str, Any]) -> str:
    """The figures of a kind in a line."""
    shown = []
    for measure in MEASURES[kind]:
        value = figures.get(measure.name)
        interval = figures.get(f"{measure.name}_ci")
        number = "unknown" if value is None else f"{value:.3f}"
        if interval:
            number += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        shown.append(f"{measure.name} {number}")
    return f"{kind} ({figures.get('n', 0)}): {', '.join(shown)}"
