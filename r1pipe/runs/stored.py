"""The runs under a root, each with its config.json and record.json.

A damaged run that the user names is a CheckpointError; `stored_runs` skips damaged runs and prints one line
that names them.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NotRequired, cast

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from r1pipe.config import ParentRef
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.files import read_object
from r1pipe.runs.record import STRICT, Edge, Record, checked, edges, read_record


class Stage(TypedDict):
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
    weights_from: NotRequired[Edge | None]
    reads_from: NotRequired[dict[str, Edge] | None]


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
    """Print a line to stderr, once per command."""
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
    reads = config.get("reads_from") or {}
    return edges({"weights": config.get("weights_from"), "data": list(reads.values())})
