"""A checkpoint under audit: its lineage with what records say, and what an answer is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from r1pipe.config import STAGE_TYPES, EvaluateConfig
from r1pipe.core.paths import RunFolder
from r1pipe.runs.lineage import training_data
from r1pipe.runs.lineage.ancestors import Ancestor

SHOWN = 8  # values that a line lists


@dataclass(frozen=True)
class Answer:
    """`lines` are what is known, or why nothing is."""

    MISSING: ClassVar[str] = "missing"

    status: str  # answered | missing | not applicable
    lines: list[str]


def answered(lines: Iterable[str]) -> Answer:
    return Answer("answered", [*lines])


def missing(*why: str) -> Answer:
    return Answer(Answer.MISSING, [*why])


def not_applicable(why: str) -> Answer:
    return Answer("not applicable", [why])


class Subject:
    """A checkpoint with its lineage: each checkpoint once, its own first."""

    def __init__(self, found: Sequence[Ancestor]):
        self.lineage = found
        once: dict[str, Ancestor] = {}
        for ancestor in found:
            once.setdefault(ancestor.parent.checkpoint, ancestor)
        self.all = list(once.values())
        self.own = self.all[0]

    @cached_property
    def trained_on(self) -> list[training_data.TrainedOn]:
        return training_data.of_ancestors(self.lineage)

    @property
    def unknown(self) -> list[str]:
        """Runs that nobody can say of what they were trained on."""
        return [f"{run.run_id}: {run.note}" for run in self.trained_on if run.kind == "unknown"]

    @property
    def trained(self) -> list[Ancestor]:
        """Those that were trained, and have a record."""
        kinds = ((one, STAGE_TYPES.get(one.parent.stage)) for one in self.all)
        return [one for one, kind in kinds if kind is not EvaluateConfig and one.record is not None]

    @property
    def metrics(self) -> dict[str, Any]:
        return record_of(self.own).get("metrics") or {}

    def of_type(self, kind: type) -> list[Ancestor]:
        return [one for one in self.trained if STAGE_TYPES.get(one.parent.stage) is kind]

    @property
    def reinforced(self) -> list[Ancestor]:
        return [one for one in self.trained if training_data.draws(one.parent.stage, one.record)]


def record_of(one: Ancestor) -> dict[str, Any]:
    """{} where it has none."""
    return dict(one.record or {})


def stage_of(one: Ancestor) -> dict[str, Any]:
    """The stage's settings in its record; {} where it has none."""
    return (record_of(one).get("config") or {}).get("stage") or {}


def folder_of(one: Ancestor) -> RunFolder:
    return RunFolder(Path(one.parent.checkpoint).parent.parent)


def listed(counts: Mapping[Any, int]) -> str:
    parts = [f"{value or 'unknown'} {rows:,}" for value, rows in [*counts.items()][:SHOWN]]
    return ", ".join(parts) + (f", and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def steps_of_funnel(run: RunFolder) -> list[dict[str, Any]]:
    """What the filters dropped, in order; [] where it has no funnel."""
    try:
        content = json.loads((run.data / "funnel.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [step for step in content if isinstance(step, dict)] if isinstance(content, list) else []
