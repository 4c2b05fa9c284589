"""The walk from a checkpoint back to all it came from, over weight and data edges; every hash checked.

Nothing stops the walk: a checkpoint that is gone, broken, edited or its own ancestor is reported as a problem
of that ancestor, naming the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from r1pipe.config import STAGE_TYPES, ParentRef, RejectionConfig
from r1pipe.config.changes import mapping_hash
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.core.paths import RunFolder, inside
from r1pipe.runs import checkpoints, data_files
from r1pipe.runs.files import read_object
from r1pipe.runs.lineage import fit, lookup
from r1pipe.runs.record import OWN_HASH, Record, edges, own_hash, read_record, record_beside
from r1pipe.runs.results import launched_with


@dataclass(frozen=True)
class Ancestor:
    """One checkpoint in a lineage, and the edge that leads to it."""

    depth: int
    edge: str  # "weights", "data", "teacher" or "judge"; "" for the checkpoint that the walk starts from
    parent: ParentRef
    record: Record | None  # None: imported, or its run has not finished
    problems: tuple[str, ...]  # what has changed, each naming its file
    notes: tuple[str, ...] = ()  # what could not be checked here
    child: str = ""  # folder of the checkpoint that came from it
    shown: bool = False  # the walk has already shown it, with its own ancestors

    @property
    def problem(self) -> str:
        return "; ".join(self.problems)


@dataclass
class CheckedCheckpoint:
    """What the files of one checkpoint and its run show."""

    record: Record | None = None
    edges: list[tuple[str, ParentRef, str | None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ancestors(start: ParentRef) -> Iterator[Ancestor]:
    """The checkpoint and all it came from, depth first, each with its hashes checked; each once in full."""
    checked: dict[tuple[str, str, str | None], CheckedCheckpoint] = {}

    def walk(
        parent: ParentRef, edge: str, record_hash: str | None, path: tuple[str, ...], root: Path | None
    ) -> Iterator[Ancestor]:
        """`path`: the checkpoints from the start to this one's child. `root`: where that child's run folder
        is, as a root may have been moved as a whole."""
        folder = lookup.current_folder(parent, root)
        if parent.run_id == lookup.BUNDLED and not lookup.is_folder(folder):
            folder = lookup.bundled_folder()  # of this installation
        here, child, depth = str(folder), path[-1] if path else "", len(path)
        if here in path:
            circle = f"{here} is its own ancestor: a record on the way was edited"
            yield Ancestor(depth, edge, parent, None, (circle,), child=child)
            return
        key = (here, parent.hash, record_hash)
        shown = key in checked
        if not shown:
            checked[key] = check_checkpoint(folder, parent, record_hash)
        result = checked[key]
        problems, notes = tuple(result.problems), tuple(result.notes)
        current = replace(parent, checkpoint=here)
        yield Ancestor(depth, edge, current, result.record, problems, notes, child, shown)
        if not shown:
            root = folder.parents[2] if len(folder.parents) > 2 else None
            for kind, further, its_record_hash in result.edges:
                yield from walk(further, kind, its_record_hash, (*path, here), root)

    return walk(start, "", None, (), None)


def check_checkpoint(folder: Path, parent: ParentRef, record_hash: str | None) -> CheckedCheckpoint:
    """`record_hash`: of the parent's record, as its child's record names it."""
    result = CheckedCheckpoint()
    if not lookup.is_folder(folder):
        result.problems.append(f"{folder} is gone")
        return result
    try:
        for name, sha in checkpoints.published(folder).items():
            if problem := checkpoints.broken(folder / name, sha):
                result.problems.append(problem)
        if parent.hash and checkpoints.manifest_hash(folder) != parent.hash:
            manifest = folder / checkpoints.MANIFEST
            result.problems.append(f"{manifest} has changed since its child was made from it")
    except CheckpointError as error:
        result.problems.append(str(error))
    try:
        check_run(folder, parent, record_hash, result)
    except CheckpointError as error:
        result.problems.append(str(error))
    return result


def check_run(folder: Path, parent: ParentRef, record_hash: str | None, result: CheckedCheckpoint) -> None:
    """Read the record and the edges of a checkpoint's run, and check them. Raises CheckpointError."""
    run = RunFolder(folder.parent.parent) if lookup.in_run(folder) else None
    path = record_beside(folder, record_hash)
    if not path.exists():
        if record_hash:
            result.problems.append(f"{path} is missing")
        if run is not None:  # it has not finished: config.json has its edges
            result.edges = launched_with(read_object(run.config), run.config)
        return
    result.record = record = read_record(path)
    result.edges = edges(record.get("parents", {}))
    own = record.get(OWN_HASH)  # records of older versions have none
    if own and own_hash(record) != own:
        result.problems.append(f"{path} was edited: it is not what its own record_hash says")
    if record_hash and own != record_hash:
        result.problems.append(f"{path} has changed since its child was made from it")
    check_data_files(folder, record, run, result)
    check_rewards(record, result)
    if run is not None:
        result.problems += contradictions(run, record, path)
        last = inside(run.path, record["checkpoint"], run.record)
        if last.resolve() != folder:
            return  # an earlier checkpoint of the run: the rest is about the last one
    if record["checkpoint_hash"] != parent.hash:
        result.problems.append(f"{path} names another checkpoint_hash than its child")
    template, settings = record.get("template_hash"), folder / fit.TOKENIZER_SETTINGS
    if template and settings.exists() and fit.template_hash(folder) != template:
        result.problems.append(f"{settings} has another template than {path} names")


def check_data_files(folder: Path, record: Record, run: RunFolder | None, result: CheckedCheckpoint) -> None:
    """Check the files that a run read its data from, if they are on this machine. Raises CheckpointError."""
    config: dict[str, Any] = record.get("config") or (read_object(run.config) if run else {})
    expected = (record.get("data") or {}).get("hash")
    if not expected and STAGE_TYPES.get(record["stage"]) is not RejectionConfig:  # an early record
        expected = record.get("data_hash")
    try:
        data = config.get("data", {})
        if not expected or data.get("kind") != "files" or data_files.hashes(data)[0] == expected:
            return
        read = [path for paths in data_files.located(data).values() for path in paths]
    except (ConfigError, KeyError, TypeError, AttributeError):
        result.problems.append(f"the group `data` of {folder}'s config cannot be read")
        return
    except OSError as error:
        result.notes.append(f"{error.filename} cannot be read here ({error.strerror}), and was not checked")
        return
    absent = [path for path in read if not path.exists()]
    named = absent or read
    listed = f"{named[0]} and {len(named) - 1} more" if len(named) > 1 else str(named[0])
    if absent:
        result.notes.append(f"{listed}: not here to check")
    else:
        result.problems.append(f"{listed}: not the data that was read")


def check_rewards(record: Record, result: CheckedCheckpoint) -> None:
    """Note the files of rewards that have another content by now, or are not on this machine."""
    for name, reward in (record.get("rewards") or {}).items():
        path = Path(reward["source"])
        if not reward["hash"]:  # no file
            continue
        if not path.is_file():
            result.notes.append(f"{path} (reward {name}): not here to check")
        elif problem := checkpoints.broken(path, reward["hash"]):
            result.notes.append(f"reward {name}: {problem}")


def contradictions(run: RunFolder, record: Record, path: Path) -> Iterator[str]:
    """Where the record at `path` disagrees with its run folder. Raises CheckpointError."""
    if path != run.record:  # of before an extension: the files are newer
        return
    config = read_object(run.config)
    try:
        # without a format, the hash is of other keys
        if "format" in record and mapping_hash(config) != record.get("config_hash"):
            yield f"{run.config} is not the config that {run.record} was made with"
    except (KeyError, TypeError, AttributeError):
        yield f"{run.config} cannot be read"
        return
    if record.get("run_id", run.run_id) != run.run_id:
        yield f"{run.record} is the record of another run ({record['run_id']})"
    launched = [(edge, parent.hash) for edge, parent, _ in launched_with(config, run.config)]
    if [(edge, parent.hash) for edge, parent, _ in edges(record.get("parents", {}))] != launched:
        yield f"{run.record} names other parents than {run.config}"
    if run.evaluation.exists() and read_object(run.evaluation) != record.get("metrics"):
        yield f"{run.record} has other metrics than {run.evaluation}"
    for file, expected in recorded_hashes(run, record).items():
        if expected and (problem := checkpoints.broken(file, expected)):
            yield problem


def recorded_hashes(run: RunFolder, record: Record) -> dict[Path, str | None]:
    """The run's files -> SHA-256 in its record; None where it has none. Raises CheckpointError."""
    hashes: dict[Path, str | None] = {}
    if STAGE_TYPES.get(record["stage"]) is RejectionConfig or "teacher" in record:
        hashes[run.dataset] = record.get("data_hash")
    for name, sha in (record.get("files") or {}).items():
        hashes[inside(run.path, name, run.record)] = sha
    hashes[run.diff] = record.get("code", {}).get("diff_hash")
    hashes[run.config_history] = record["history"]["hash"] if "history" in record else None
    return hashes
