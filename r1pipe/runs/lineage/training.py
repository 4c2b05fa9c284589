"""The runs that made a checkpoint, over weight and data edges, as their records name them.

Unlike `ancestors` nothing is hashed: this is for what they were trained on, not for whether it is unchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1pipe.config import ParentRef
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.files import read_object
from r1pipe.runs.lineage import lookup
from r1pipe.runs.record import edges, read_record, record_beside
from r1pipe.runs.results import launched_with


@dataclass(frozen=True)
class MadeBy:
    """One run behind a checkpoint."""

    run_id: str
    stage: str
    folder: RunFolder | None = None  # None: only its checkpoint is here
    config: dict[str, Any] | None = None
    data_hash: str | None = None  # of the source that it read, in its record
    problem: str = ""  # why nothing more is known of it


def made_by(start: ParentRef) -> Iterator[MadeBy]:
    """Every run behind the checkpoint, its own first, each once."""
    seen: set[str] = set()

    def walk(parent: ParentRef, root: Path | None) -> Iterator[MadeBy]:
        folder = lookup.current_folder(parent, root)
        if parent.run_id == lookup.BUNDLED and not lookup.is_folder(folder):
            folder = lookup.bundled_folder()
        if str(folder) in seen:
            return
        seen.add(str(folder))
        try:
            run, further = _read(folder, parent)
        except CheckpointError as error:
            run, further = MadeBy(parent.run_id, parent.stage, problem=str(error)), []
        yield run
        root = folder.parents[2] if len(folder.parents) > 2 else None
        for edge in further:
            yield from walk(edge, root)

    return walk(start, None)


def _read(folder: Path, parent: ParentRef) -> tuple[MadeBy, list[ParentRef]]:
    """The run that made a checkpoint, and its parents. Raises CheckpointError."""
    if not lookup.is_folder(folder):
        raise CheckpointError(f"{folder} is gone")
    run = RunFolder(folder.parent.parent) if lookup.in_run(folder) else None
    path = record_beside(folder)
    if not path.exists():
        if run is None:
            raise CheckpointError(f"{folder} has no record: its training data is not known")
        config = read_object(run.config)
        found = MadeBy(run.run_id, parent.stage, run, config)
        return found, [edge for _, edge, _ in launched_with(config, run.config)]
    record = read_record(path)
    made_with = read_object(run.config) if run else record.get("config")
    own = (record.get("data") or {}).get("hash")
    found = MadeBy(record.get("run_id", parent.run_id), record["stage"], run, made_with, own)
    return found, [edge for _, edge, _ in edges(record.get("parents", {}))]
