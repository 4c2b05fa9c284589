"""The dataset of a distillation: data/samples.parquet with its funnel, however its rows were made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1pipe.config import DistillConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Demonstration, Prompt
from r1pipe.data.screening import Screening
from r1pipe.rewards.accuracy import is_verifiable
from r1pipe.runs import samples
from r1pipe.runs.checkpoints import file_hash
from r1pipe.runs.files import write_json
from r1pipe.train.extract.stored import HASH
from r1pipe.train.run import Run, log
from r1pipe.train.sft.filters import FILTERS, Sampled, apply_filters

# Columns besides those of r1pipe.runs.samples.
COLUMNS: dict[str, pa.DataType] = {
    "checker": pa.string(),  # JSON, for the task's checker
    "score": pa.float32(),  # of feedback: the teacher's, in 0..1; in an answer's group more is better
    "pair": pa.int32(),  # the same number for a correction and the answer that it corrects
    "distribution": pa.int64(),  # the row of its tokens' probabilities (r1pipe.train.extract.stored)
}
Steps = list[dict[str, Any]]


@dataclass(frozen=True)
class Kept:
    """One row of the dataset to be."""

    prompt: Prompt
    response: str
    origin: Mapping[str, str | None]  # columns of samples.ORIGIN
    filters: tuple[str, ...] = ()
    score: float | None = None
    pair: int | None = None
    distribution: int | None = None


def left_out(stage: DistillConfig) -> list[str]:
    """The filters that the config leaves out."""
    wanted = {"correct": stage.filters.correct_only, "well formed": stage.filters.well_formed}
    return [name for name, is_wanted in wanted.items() if not is_wanted]


def filters_of(stage: DistillConfig, kept: Sampled) -> tuple[str, ...]:
    """The names of the filters that a kept answer has passed."""
    skipped = left_out(stage) if "accuracy" in kept.scores else ["correct", *left_out(stage)]
    return tuple(name for name in FILTERS if name not in skipped)


def filtered(
    run: Run[Any], drawn: Sequence[Sampled], questions: Sequence[str]
) -> tuple[list[Sampled], Steps]:
    """What rejection sampling's filters keep of a teacher's answers, and their funnel. `questions`: of the
    evaluation."""
    kept, steps = apply_filters(drawn, run.stage.filters, questions, left_out(run.stage))
    return kept, [{"name": "answers drawn", "kept": len(drawn), "dropped": 0, "examples": []}, *steps]


def write_dataset(run: Run[Any], rows: Sequence[Kept], funnel: Steps) -> None:
    """data/funnel.json, which is shown, too, and data/samples.parquet, of the rows that `screening` leaves.
    Raises DataError without rows."""
    kept = screened_rows(run, rows)
    funnel = [*funnel, {"name": "screening", "kept": len(kept), "dropped": len(rows) - len(kept)}]
    rows = kept
    for step in funnel:
        line = f"{step['name']}: {step['kept']} kept, {step['dropped']} dropped"
        log.info("%s", line)
        if step["dropped"] or step is funnel[0]:
            run.show(say=line)
    write_json(run.folder.data / "funnel.json", funnel)
    if not rows:
        worst = max(funnel, key=lambda step: step["dropped"], default=None)
        dropped = f"{worst['dropped']} dropped by '{worst['name']}'" if worst else "all are of the evaluation"
        raise DataError(
            f"nothing to train on: the filters left nothing of what the teacher gave ({dropped}; "
            f"see {run.folder.data / 'funnel.json'}); ask another teacher, or "
            "loosen stage.filters"
        )
    stored = [_stored(row) for row in rows]
    there = {name for row in stored for name in row}
    columns = {name: kind for name, kind in COLUMNS.items() if name in there}
    beside = run.folder.distributions
    metadata = {HASH: file_hash(beside).encode()} if "distribution" in there else None
    samples.write(run.folder.dataset, stored, columns, metadata)


def screened_rows(run: Run[Any], rows: Sequence[Kept]) -> list[Kept]:
    """The rows that stay, rewritten where that is configured; one whose tokens have probabilities cannot be
    rewritten, and goes."""
    screening, kept = Screening(run.config.screening), list[Kept]()
    for row in rows:
        for one in screening.demonstrations([_demonstration(row)]):
            if one.response == row.response or row.distribution is None:
                kept.append(replace(row, response=one.response))
    write_json(run.folder.screening, screening.report())
    return kept


def read_rows(path: Path) -> list[samples.Row]:
    """All columns of a dataset; null where it has none. Raises CheckpointError where it cannot be read."""
    return samples.read(path, [*samples.COLUMNS, *COLUMNS])


def _stored(row: Kept) -> samples.Row:
    """The columns that the row has."""
    kind = "reasoning" if is_verifiable(row.prompt) else "general"
    stored = samples.row_of(_demonstration(row), kind)
    if row.prompt.checker:
        stored["checker"] = json.dumps(row.prompt.checker)
    more = {"score": row.score, "pair": row.pair, "distribution": row.distribution}
    stored |= {name: value for name, value in more.items() if value is not None}
    return stored


def _demonstration(row: Kept) -> Demonstration:
    return Demonstration(row.prompt, row.response, filters=row.filters, **row.origin)  # type: ignore[arg-type]
