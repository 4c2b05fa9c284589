"""Finding checkpoints: of a run, a folder or a stage; and where a recorded checkpoint is now.

Run folders may have been copied or moved, also to other machines.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from r1pipe.config import STAGE_TYPES, EvaluateConfig, ParentRef, RunConfig
from r1pipe.config.groups import read
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import IMPORTED, RunFolder, content_dir, inside
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object
from r1pipe.runs.record import record_of
from r1pipe.runs.results import finished, stage_name

BUNDLED = "bundled"


@dataclass(frozen=True)
class SearchPath:
    """Where a checkpoint's name is looked up."""

    root: Path
    pipeline: str
    tracking_uri: str | None

    @classmethod
    def of(cls, config: RunConfig) -> "SearchPath":
        return cls(Path(config.root), config.pipeline, config.tracking.uri)


def run_folders(root: Path) -> list[RunFolder]:
    """Every run folder under the root, finished or not."""
    return [RunFolder(path.parent) for path in sorted(root.glob("*/config.json"))]


def is_run(path: Path) -> bool:
    """Whether a folder's config.json names a stage; a checkpoint's does not. Raises CheckpointError."""
    config = path / "config.json"
    return config.is_file() and stage_name(read_object(config)) is not None


def in_run(checkpoint: Path) -> bool:
    """Whether a checkpoint folder is in a run folder. Raises CheckpointError."""
    run = RunFolder(checkpoint.parent.parent)
    return checkpoint.parent.name == run.checkpoints.name and is_run(run.path)


def checkpoint_of_run(run: RunFolder) -> ParentRef:
    """The last checkpoint of a finished run. Raises CheckpointError."""
    record = record_of(run)
    folder = inside(run.path, record["checkpoint"], run.record).resolve()
    return ParentRef(record["stage"], run.run_id, str(folder), record["checkpoint_hash"])


def checkpoint_of_folder(folder: Path) -> ParentRef:
    """A checkpoint folder, with its run's stage and id if it is in a run folder. Raises CheckpointError."""
    folder = folder.resolve()
    stage, run_id = "external", folder.name
    if in_run(folder):
        run = RunFolder(folder.parent.parent)
        stage, run_id = read_object(run.config)["stage"]["name"], run.run_id
    return ParentRef(stage, run_id, str(folder), checkpoints.manifest_hash(folder))


def bundled_folder() -> Path:
    return (content_dir() / "base").resolve()


def bundled() -> ParentRef:
    """The base that comes with r1pipe. Raises CheckpointError."""
    return replace(checkpoint_of_folder(bundled_folder()), stage="pretrain", run_id=BUNDLED)


def newest_run(stage: str, path: SearchPath) -> RunFolder | None:
    """The run of this stage and pipeline that finished last."""
    runs = [run for run, pipeline in _finished_runs(stage, path.root) if pipeline == path.pipeline]
    return runs[-1] if runs else None


def _finished_runs(stage: str, root: Path) -> list[tuple[RunFolder, str]]:
    """Finished runs of a stage with their pipelines, oldest first."""
    runs = finished(root, f"{stage}-*")
    return [(run.folder, record["pipeline"]) for run, record in runs if record["stage"] == stage]


def checkpoint_of_stage(
    stage: str, path: SearchPath, without_runs: Collection[str] = (), as_data: bool = False
) -> ParentRef:
    """The newest finished run of a stage in this pipeline.

    Without one, `pretrain` means the bundled base, and a stage that only measures means the stage that it
    measures. `without_runs`: stages whose runs do not count. Raises CheckpointError.
    """
    run = None if stage in without_runs else newest_run(stage, path)
    if run is not None:
        return checkpoint_of_run(run)
    if stage == "pretrain":
        return bundled()
    measured = read(f"stage/{stage}")["starts_from"]
    if STAGE_TYPES[stage] is EvaluateConfig and measured is not None:
        return checkpoint_of_stage(measured, path, without_runs, as_data)
    others = sorted({pipeline for _, pipeline in _finished_runs(stage, path.root)})
    hint = f"; other pipelines have one: pipeline={others[0]}" if others else ""
    parent = "" if as_data else " or give parent=CHECKPOINT"  # `parent` names weights
    raise CheckpointError(
        f"stage {stage} has no finished run in pipeline {path.pipeline} under {path.root}; make it with "
        f"`r1pipe run stage={stage}`{parent}{hint}"
    )


# --- checkpoints that were moved


def current_folder(parent: ParentRef, root: Path | None) -> Path:
    """Where a recorded checkpoint is now: under `root`, which may have been moved as a whole, or else the
    recorded folder, even if that is gone."""
    recorded = Path(parent.checkpoint)
    is_imported = recorded.parent.name == IMPORTED
    folder = Path(IMPORTED) if is_imported else Path(parent.run_id, "checkpoints")
    moved = root / folder / recorded.name if root else None
    for path in (moved, recorded):
        if path is not None and is_folder(path):
            return path.resolve()
    return recorded


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a damaged record may name what cannot be a path
        return False


def relocated(parent: ParentRef, root: Path) -> ParentRef:
    """The parent with its current folder.

    Raises CheckpointError if it is gone, or if the folder found under `root` holds another checkpoint.
    """
    folder = current_folder(parent, root)
    if not is_folder(folder):
        raise CheckpointError(
            f"the checkpoint of {parent.run_id} (stage {parent.stage}) is neither under {root} nor at "
            f"{parent.checkpoint}; copy the run folder {parent.run_id} to {root}"
        )
    has_moved = str(folder) != parent.checkpoint
    if has_moved and parent.hash and checkpoints.manifest_hash(folder) != parent.hash:
        raise CheckpointError(
            f"{folder} is not the checkpoint that {parent.run_id} had ({parent.hash[:12]}); copy that run "
            f"folder to {root} again"
        )
    return replace(parent, checkpoint=str(folder))


def with_relocated_parents(config: RunConfig, root: Path) -> RunConfig:
    """The config with its parents' current folders. Raises CheckpointError."""
    weights, teacher, judge = config.weights_from, config.teacher_from, config.judge_from
    return replace(
        config,
        weights_from=relocated(weights, root) if weights else None,
        reads_from={stage: relocated(parent, root) for stage, parent in config.reads_from.items()},
        teacher_from=relocated(teacher, root) if teacher else None,
        judge_from=relocated(judge, root) if judge else None,
    )
