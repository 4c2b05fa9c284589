"""A CHECKPOINT that a user names -> its folder and hash.

CHECKPOINT is a run id, a path (run folder or checkpoint folder), a stage name (its newest finished run
in this pipeline), or `models:/name@alias`.
"""

import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from r1pipe.config import STAGE_TYPES, EvaluateConfig, ParentRef, RunConfig
from r1pipe.config.groups import read
from r1pipe.core.errors import CheckpointError, nearest
from r1pipe.core.paths import RunFolder, content_dir, inside
from r1pipe.runs import checkpoints
from r1pipe.runs.jsonfile import read_object
from r1pipe.runs.recorded import record_of

BUNDLED = "bundled"


@dataclass(frozen=True)
class Place:
    """Where names of checkpoints are looked up."""

    root: Path
    pipeline: str
    tracking_uri: str | None

    @classmethod
    def of(cls, config: RunConfig) -> "Place":
        return cls(Path(config.root), config.pipeline, config.tracking.uri)


def runs(root: Path) -> list[RunFolder]:
    """Every run folder under the root, finished or not."""
    return [RunFolder(path.parent) for path in sorted(root.glob("*/config.json"))]


def newest(stage: str, place: Place) -> RunFolder | None:
    """The run of this stage and pipeline that finished last."""
    found = []
    for run in runs(place.root):
        if run.record.exists() and run.run_id.startswith(f"{stage}-"):
            record = record_of(run)
            if (record["stage"], record["pipeline"]) == (stage, place.pipeline):
                found.append((record["created"], run.run_id, run))
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def of_run(run: RunFolder) -> ParentRef:
    """What a finished run made."""
    record = record_of(run)
    folder = inside(run.path, record["checkpoint"], run.record).resolve()
    return ParentRef(record["stage"], run.run_id, str(folder), record["checkpoint_hash"])


def of_folder(folder: Path) -> ParentRef:
    """A checkpoint folder by itself; inside a run folder it is known by the run. Raises CheckpointError."""
    folder = folder.resolve()
    run = RunFolder(folder.parent.parent)
    known = read_object(run.config) if in_run(folder) else {}
    stage = known["stage"]["name"] if known else "external"
    run_id = run.run_id if known else folder.name
    return ParentRef(stage, run_id, str(folder), checkpoints.manifest_hash(folder))


def bundled_folder() -> Path:
    return (content_dir() / "base").resolve()


def bundled() -> ParentRef:
    """The base that comes with r1pipe. Raises CheckpointError."""
    return replace(of_folder(bundled_folder()), stage="pretrain", run_id=BUNDLED)


def of_stage(
    stage: str, place: Place, without_runs: Collection[str] = (), as_data: bool = False
) -> ParentRef:
    """The newest finished run of a stage; without one, `pretrain` means the bundled base, and a stage that
    only measures means what it would have measured. Raises CheckpointError."""
    run = None if stage in without_runs else newest(stage, place)
    if run is not None:
        return of_run(run)
    if stage == "pretrain":
        return bundled()
    above = read(f"stage/{stage}")["starts_from"]
    if STAGE_TYPES[stage] is EvaluateConfig and above is not None:
        return of_stage(above, place, without_runs, as_data)
    elsewhere = sorted({record_of(run)["pipeline"] for run in runs(place.root) if run.record.exists()})
    others = [name for name in elsewhere if newest(stage, replace(place, pipeline=name))]
    hint = f"; other pipelines have one: pipeline={others[0]}" if others else ""
    given = "" if as_data else " or give parent=CHECKPOINT"  # that names weights
    raise CheckpointError(
        f"stage {stage} has no finished run in pipeline {place.pipeline} under {place.root}; make it with "
        f"`r1pipe run stage={stage}`{given}{hint}"
    )


def resolve(name: str, place: Place) -> ParentRef:
    """The checkpoint that a user means by `name`. Raises CheckpointError naming the nearest known one."""
    if name.startswith("models:/"):
        from r1pipe.tracking import resolve_model

        return of_folder(resolve_model(name, place.root, place.tracking_uri))
    if name in STAGE_TYPES:
        return of_stage(name, place)
    if name == BUNDLED:
        return bundled()
    for path in (place.root / name, Path(name)):
        if is_run(path):
            return of_run(RunFolder(path.resolve()))
        if path.is_dir():
            must_be_imported(path)
            return of_folder(path)
    known = [run.run_id for run in runs(place.root) if run.record.exists()]
    raise CheckpointError(f"no checkpoint {name}; {nearest(name, [*STAGE_TYPES, *known])}")


def must_be_imported(folder: Path) -> None:
    """Raises CheckpointError for published weights that `r1pipe import` has not taken in."""
    config = folder / "config.json"
    if config.is_file() and not (folder / checkpoints.MANIFEST).exists():
        model_type = read_object(config).get("model_type")
        if isinstance(model_type, str):
            raise CheckpointError(
                f"{folder} holds published weights (model_type {model_type}); take them in first: "
                f"r1pipe import {shlex.quote(str(folder))}"
            )


def is_run(path: Path) -> bool:
    """A run folder's config.json names a stage, a checkpoint's does not. Raises CheckpointError."""
    config = path / "config.json"
    return config.is_file() and isinstance(_named_stage(read_object(config)), str)


def _named_stage(config: dict) -> object:
    stage = config.get("stage")
    return stage.get("name") if isinstance(stage, dict) else None


def in_run(checkpoint: Path) -> bool:
    """Whether a checkpoint folder lies in a run folder. Raises CheckpointError."""
    run = RunFolder(checkpoint.parent.parent)
    return checkpoint.parent.name == run.checkpoints.name and is_run(run.path)
