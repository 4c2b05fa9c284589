"""The runs under a root with their config.json and record.json, and the finished ones as rows of a table, for
`r1pipe compare`, the report and MLflow.

A damaged run that the user names is a CheckpointError; `stored_runs` skips damaged runs and prints one line
that names them.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NotRequired, cast

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from r1pipe.config import STAGE_TYPES, ParentRef
from r1pipe.config.changes import ABSENT, decisive
from r1pipe.core.errors import CheckpointError, nearest
from r1pipe.core.formatting import duration, number, percent
from r1pipe.core.paths import RunFolder
from r1pipe.runs.files import read_object
from r1pipe.runs.record import METRICS, STRICT, Edge, Parents, Record, checked, edges, read_record, record_of

NOT_SETTINGS = ("seed", "pipeline")  # config keys that are none


class Stage(TypedDict):
    name: str


class Benchmark(TypedDict):
    name: str


class Recipe(TypedDict, total=False):
    name: str
    stages: list[str]
    controls: list[str]


@with_config(STRICT)
class StoredConfig(TypedDict):
    """The part of config.json that is read here; r1pipe.config.read_config reads all of it."""

    stage: Stage
    pipeline: NotRequired[str]
    seed: NotRequired[int]
    recipe: NotRequired[Recipe | None]
    benchmark: NotRequired[Benchmark | None]
    weights_from: NotRequired[Edge | None]
    reads_from: NotRequired[dict[str, Edge] | None]
    teacher_from: NotRequired[Edge | None]


_CONFIG = TypeAdapter(StoredConfig)


@dataclass(frozen=True)
class StoredRun:
    """A run folder with its config.json and, if it has finished, its record.json."""

    folder: RunFolder
    config: dict[str, Any]
    record: Record | None

    @classmethod
    def read(cls, folder: RunFolder) -> "StoredRun":
        """Raises CheckpointError if one of the two is damaged, or config.json is missing."""
        config = checked(_CONFIG, read_object(folder.config), folder.config)
        return cls(folder, config, read_record(folder.record) if folder.record.exists() else None)

    @property
    def stage(self) -> str:
        return self.config["stage"]["name"]

    @property
    def recipe(self) -> Recipe:
        return cast(Recipe, self.config.get("recipe") or {})

    @property
    def measured(self) -> tuple[str, str] | tuple[()]:
        """The benchmark that it measured, and the hash of the weights; empty for other runs."""
        benchmark, weights = self.config.get("benchmark"), self.config.get("weights_from") or {}
        return (benchmark["name"], weights.get("hash", "")) if benchmark else ()

    @property
    def is_control(self) -> bool:
        return self.stage in self.recipe.get("controls", [])


def stored_runs(root: Path, pattern: str = "*") -> list[StoredRun]:
    """Every run under the root, by name. Skips damaged runs and names them in one line on stderr."""
    runs: list[StoredRun] = []
    damaged: list[tuple[str, CheckpointError]] = []
    for path in sorted(root.glob(f"{pattern}/config.json")):
        try:
            if stage_name(read_object(path)) is not None:  # else an exported checkpoint
                runs.append(StoredRun.read(RunFolder(path.parent)))
        except CheckpointError as error:
            damaged.append((path.parent.name, error))
    if damaged:
        names = ", ".join(name for name, _ in damaged)
        warn_once(f"warning: skipped {len(damaged)} damaged run(s) ({names}): {damaged[0][1]}")
    return runs


@cache
def warn_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def stage_name(config: Mapping[str, Any]) -> str | None:
    """The stage in a run's config.json; None for a checkpoint's, which describes a model."""
    stage = config.get("stage")
    name = stage.get("name") if isinstance(stage, dict) else None
    return name if isinstance(name, str) else None


def finished(root: Path, pattern: str = "*") -> list[tuple[StoredRun, Record]]:
    """Those of `stored_runs` that have a record, oldest first."""
    done = [(run, run.record) for run in stored_runs(root, pattern) if run.record is not None]
    return sorted(done, key=lambda pair: (pair[1]["created"], pair[0].folder.run_id))


def launched_with(config: Mapping[str, Any], path: Path) -> list[tuple[str, ParentRef, str | None]]:
    """The edges in a run's config.json. Raises CheckpointError."""
    checked(_CONFIG, config, path)
    reads, teacher = config.get("reads_from") or {}, config.get("teacher_from")
    parents: Parents = {"weights": config.get("weights_from"), "data": list(reads.values())}
    return edges({**parents, "teacher": teacher} if teacher else parents)


# --- the table


def finished_runs(root: Path | str) -> list[StoredRun]:
    return [run for run, _ in finished(Path(root))]


def choose(root: Path | str, names: Sequence[str] | None, pipeline: str | None) -> list[StoredRun]:
    """The runs to compare, by default the newest finished run of each stage and seed, and of each benchmark
    and checkpoint.

    `names`: run ids, run folders, or stages (every finished run of that stage). `pipeline`: limits stages and
    the default to one. Raises CheckpointError for a run that does not exist, is damaged, or has not finished.
    """
    chosen: dict[Any, StoredRun] = {}
    if names:
        for name in names:
            for run in named(Path(root), name, pipeline):
                chosen[run.folder.path.resolve()] = run
        return list(chosen.values())
    for run in finished_runs(root):
        if pipeline in (None, run.config.get("pipeline")):
            chosen[run.stage, run.config.get("seed"), *run.measured] = run

    def order(run: StoredRun) -> tuple:
        stages = [*run.recipe.get("stages", []), *run.recipe.get("controls", [])]
        position = stages.index(run.stage) if run.stage in stages else len(stages)
        return position, run.stage, run.measured, run.config.get("seed") or 0

    return sorted(chosen.values(), key=order)


def named(root: Path, name: str, pipeline: str | None) -> list[StoredRun]:
    """The run, or the finished runs of the stage, of this name. Raises CheckpointError as `choose` does."""
    for folder in (RunFolder(root / name), RunFolder(name)):
        if folder.config.exists():
            record_of(folder)
            return [StoredRun.read(folder)]
    runs = finished_runs(root)
    if name not in STAGE_TYPES:
        known = [*STAGE_TYPES, *(run.folder.run_id for run in runs)]
        raise CheckpointError(f"no run {name} under {root}; {nearest(name, known)}")
    pipelines = [(run, run.config.get("pipeline")) for run in runs if run.stage == name]
    found = [run for run, own in pipelines if pipeline in (None, own)]
    if not found:
        others = sorted({str(own) for _, own in pipelines})
        hint = f"other pipelines have one: pipeline={others[0]}" if others else "give root=DIR or a run id"
        raise CheckpointError(f"stage {name} has no finished run in pipeline {pipeline} under {root}; {hint}")
    return found


def row(run: StoredRun) -> dict[str, Any]:
    """A run as a row of the table; missing and non-finite values are None."""
    record: Mapping[str, Any] = run.record or {}
    metrics = record.get("metrics", {})
    return {
        "stage": run.stage,
        "seed": record.get("seed", run.config.get("seed")),
        **{name: _finite(metrics.get(name)) for name in METRICS},
        "wall_s": record.get("wall_s"),
        "run_id": record.get("run_id") or run.folder.run_id,
        "run_dir": str(run.folder.path.resolve()),
        "control": run.is_control,
        "parent": (run.config.get("weights_from") or {}).get("run_id"),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows(
    root: Path | str, names: Sequence[str] | None = None, pipeline: str | None = None
) -> list[dict[str, Any]]:
    """Rows of the table, in the order and with the errors of `choose`.

    With `names`, each row has `settings`: its values of the config keys in which runs of one stage differ;
    parents count by their hash.
    """
    chosen = choose(root, names, pipeline)
    if not names:
        return [row(run) for run in chosen]
    settings = [decisive(run.config) for run in chosen]
    differing: dict[str, None] = {}  # ordered
    for stage in {run.stage for run in chosen}:
        of_stage = [values for run, values in zip(chosen, settings, strict=True) if run.stage == stage]
        for key in dict.fromkeys(key for values in of_stage for key in values):
            first = of_stage[0].get(key, ABSENT)
            if key not in NOT_SETTINGS and any(values.get(key, ABSENT) != first for values in of_stage):
                differing[key] = None
    return [
        row(run) | {"settings": {key: values[key] for key in differing if key in values}}
        for run, values in zip(chosen, settings, strict=True)
    ]


def accuracy(row: dict) -> str:
    """pass@1 with its interval: `79.0 77-81`."""
    ci, share = row.get("pass_at_1_ci"), row.get("pass_at_1")
    interval = f" {100 * ci[0]:.0f}-{100 * ci[1]:.0f}" if ci and share is not None else ""
    return percent(share) + interval


COLUMNS: dict[str, Callable[[dict], str]] = {
    "seed": lambda row: number(row.get("seed")),
    "pass@1 (95%)": accuracy,
    "greedy": lambda row: percent(row.get("greedy")),
    "cons": lambda row: percent(row.get("cons_at_k")),
    "format": lambda row: percent(row.get("format_rate")),
    "lang": lambda row: percent(row.get("language_consistency")),
    "len": lambda row: number(row.get("length_mean")),
    "cut": lambda row: percent(row.get("truncation_rate")),
    "general": lambda row: percent(row.get("general_score")),
    "pref": lambda row: percent(row.get("preference_score")),
    "time": lambda row: duration(row.get("wall_s")),
}


def as_json(table_rows: list[dict]) -> str:
    """The rows as a JSON list, for scripts."""
    return json.dumps(table_rows, ensure_ascii=False, indent=2)
