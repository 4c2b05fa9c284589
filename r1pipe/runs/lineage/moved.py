"""Where a recorded checkpoint lies now: run folders may have been copied or moved, also to other machines."""

from dataclasses import replace
from pathlib import Path

from r1pipe.config import ParentRef, RunConfig
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import IMPORTED
from r1pipe.runs import checkpoints


def located(parent: ParentRef, root: Path | None) -> Path:
    """The checkpoint's folder under `root`, which may have been copied or moved as a whole, else where it was
    recorded, whether it is there or not."""
    recorded_at = Path(parent.checkpoint)
    imported = recorded_at.parent.name == IMPORTED
    own = Path(IMPORTED) if imported else Path(parent.run_id, "checkpoints")
    beside = root / own / recorded_at.name if root else None
    for place in (beside, recorded_at):
        if place is not None and is_folder(place):
            return place.resolve()
    return recorded_at


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a record may name what is no path at all
        return False


def present(parent: ParentRef, root: Path) -> ParentRef:
    """The parent with the folder that it lies in now.

    Raises CheckpointError where it is gone, or where the folder found under `root` holds another checkpoint.
    """
    folder = located(parent, root)
    if not is_folder(folder):
        raise CheckpointError(
            f"the checkpoint of {parent.run_id} (stage {parent.stage}) is neither under {root} nor at "
            f"{parent.checkpoint}; copy the run folder {parent.run_id} to {root}"
        )
    moved = str(folder) != parent.checkpoint
    if moved and parent.hash and checkpoints.manifest_hash(folder) != parent.hash:
        raise CheckpointError(
            f"{folder} is not the checkpoint that {parent.run_id} had ({parent.hash[:12]}); copy that run "
            f"folder to {root} again"
        )
    return replace(parent, checkpoint=str(folder))


def with_present_parents(config: RunConfig, root: Path) -> RunConfig:
    """A run's config with its parents where they lie now. Raises CheckpointError."""
    weights = config.weights_from
    return replace(
        config,
        weights_from=present(weights, root) if weights else None,
        reads_from={stage: present(parent, root) for stage, parent in config.reads_from.items()},
    )
