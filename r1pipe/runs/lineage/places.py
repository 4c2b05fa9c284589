"""A CHECKPOINT that a user names -> its folder and hash.

CHECKPOINT is a run id, a path (run folder or checkpoint folder), a stage name (its newest finished run
in this pipeline), or `models:/name@alias`.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from r1pipe.config import STAGE_TYPES, EvaluateConfig, ParentRef, RunConfig
from r1pipe.config.groups import read
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder, content_dir, inside
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object
from r1pipe.runs.record import record_of
from r1pipe.runs.stored import finished, stage_name, stored_runs

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
    found = [
        run.folder
        for run, record in finished(stored_runs(place.root, f"{stage}-*"))
        if (record["stage"], record["pipeline"]) == (stage, place.pipeline)
    ]
    return found[-1] if found else None


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
    same_stage = finished(stored_runs(place.root, f"{stage}-*"))
    others = sorted({record["pipeline"] for _, record in same_stage if record["stage"] == stage})
    hint = f"; other pipelines have one: pipeline={others[0]}" if others else ""
    given = "" if as_data else " or give parent=CHECKPOINT"  # that names weights
    raise CheckpointError(
        f"stage {stage} has no finished run in pipeline {place.pipeline} under {place.root}; make it with "
        f"`r1pipe run stage={stage}`{given}{hint}"
    )


def is_run(path: Path) -> bool:
    """A run folder's config.json names a stage, a checkpoint's does not. Raises CheckpointError."""
    config = path / "config.json"
    return config.is_file() and stage_name(read_object(config)) is not None


def in_run(checkpoint: Path) -> bool:
    """Whether a checkpoint folder lies in a run folder. Raises CheckpointError."""
    run = RunFolder(checkpoint.parent.parent)
    return checkpoint.parent.name == run.checkpoints.name and is_run(run.path)
