"""The walk from a checkpoint back to all it came from, over weight and data edges; every hash checked.

Nothing on the way can stop the walk: what is gone, broken, edited or goes in a circle is a problem of that
ancestor, told with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from r1pipe.config import STAGE_TYPES, ParentRef, RejectionConfig
from r1pipe.config.changes import mapping_hash
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.core.paths import RunFolder, inside
from r1pipe.runs import checkpoints
from r1pipe.runs import data_files as datafiles
from r1pipe.runs.files import read_object
from r1pipe.runs.lineage import fit, moved, places
from r1pipe.runs.record import OWN_HASH, Record, edges, own_hash, read_record, record_beside
from r1pipe.runs.stored import launched_with


@dataclass(frozen=True)
class Ancestor:
    """One checkpoint in a lineage, and by which kind of edge its child came from it."""

    depth: int
    edge: str  # "" for the checkpoint asked about, "weights" or "data"
    parent: ParentRef
    record: Record | None  # None where it has none (brought from elsewhere, or its run has not finished)
    problems: tuple[str, ...]  # what is not as it was, each naming its file; () if all is
    notes: tuple[str, ...] = ()  # what could not be checked here
    child: str = ""  # the checkpoint folder that came from it
    shown: bool = False  # it stands further above already, with its own ancestors

    @property
    def problem(self) -> str:
        return "; ".join(self.problems)


@dataclass
class Step:
    """An edge still to be followed."""

    parent: ParentRef
    edge: str
    depth: int
    record_hash: str | None  # of the parent's record, as its child's record names it
    way: tuple[str, ...]  # the checkpoints from the one asked about to this one's child
    root: Path | None = None  # where the child's run folder lies: a root that was moved as a whole


@dataclass
class CheckedFile:
    """What was found at one checkpoint."""

    folder: Path
    record: Record | None = None
    edges: list[tuple[str, ParentRef, str | None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ancestors(start: ParentRef) -> Iterator[Ancestor]:
    """The checkpoint and all it came from, depth first, each with its hashes checked; each once in full."""
    looked: dict[tuple[str, str, str | None], CheckedFile] = {}
    todo = [Step(start, "", 0, None, ())]
    while todo:
        step = todo.pop()
        folder = moved.located(step.parent, step.root)
        if step.parent.run_id == places.BUNDLED and not moved.is_folder(folder):
            folder = places.bundled_folder()  # of this installation
        here, child = str(folder), step.way[-1] if step.way else ""
        if here in step.way:
            circle = f"{here} is its own ancestor: a record on the way was edited"
            yield Ancestor(step.depth, step.edge, step.parent, None, (circle,), child=child)
            continue
        key = (here, step.parent.hash, step.record_hash)
        known = key in looked
        found = looked.setdefault(key, look(folder, step)) if not known else looked[key]
        told = tuple(found.problems), tuple(found.notes)
        parent = replace(step.parent, checkpoint=here)
        yield Ancestor(step.depth, step.edge, parent, found.record, *told, child, shown=known)
        if not known:
            way, root = (*step.way, here), run_root(folder)
            todo += [
                Step(parent, edge, step.depth + 1, record_hash, way, root)
                for edge, parent, record_hash in reversed(found.edges)
            ]


def run_root(checkpoint: Path) -> Path | None:
    return checkpoint.parents[2] if len(checkpoint.parents) > 2 else None


def look(folder: Path, step: Step) -> CheckedFile:
    """Check one checkpoint, its record, and the way back from it."""
    found = CheckedFile(folder)
    if not moved.is_folder(folder):
        found.problems.append(f"{folder} is gone")
        return found
    found.problems += broken_files(folder, step.parent.hash)
    try:
        read_run(found, step)
    except CheckpointError as error:
        found.problems.append(str(error))
    return found


def broken_files(folder: Path, expected: str) -> Iterator[str]:
    """Every published file of a checkpoint that is not what was saved, and whether the whole is another."""
    try:
        for name, sha in checkpoints.published(folder).items():
            problem = checkpoints.broken(folder / name, sha)
            if problem:
                yield problem
        if expected and checkpoints.manifest_hash(folder) != expected:
            yield f"{folder / checkpoints.MANIFEST} has changed since its child was made from it"
    except CheckpointError as error:
        yield str(error)


def read_run(found: CheckedFile, step: Step) -> None:
    """The record and the edges of a checkpoint's run; what contradicts it. Raises CheckpointError."""
    run = RunFolder(found.folder.parent.parent) if places.in_run(found.folder) else None
    path = record_beside(found.folder, step.record_hash)
    if not path.exists():
        if step.record_hash:
            found.problems.append(f"{path} is missing")
        if run is not None:  # it has not finished: its edges are those that it was launched with
            found.edges = launched_with(read_object(run.config), run.config)
        return
    found.record = record = read_record(path)
    found.edges = edges(record.get("parents", {}))
    own = record.get(OWN_HASH)  # records of older versions have none
    if own and own_hash(record) != own:
        found.problems.append(f"{path} was edited: it is not what its own record_hash says")
    if step.record_hash and own != step.record_hash:
        found.problems.append(f"{path} has changed since its child was made from it")
    read_files(found, record, run)
    if run is not None:
        found.problems += contradictions(run, record, path)
        last = inside(run.path, record["checkpoint"], run.record)
        if last.resolve() != found.folder:
            return  # a checkpoint from the middle of the run: what follows is about the last one
    if record["checkpoint_hash"] != step.parent.hash:
        found.problems.append(f"{path} names another checkpoint_hash than its child")
    template, settings = record.get("template_hash"), found.folder / fit.TOKENIZER_SETTINGS
    if template and settings.exists() and fit.template_hash(found.folder) != template:
        found.problems.append(f"{settings} has another template than {path} names")


def read_files(found: CheckedFile, record: Record, run: RunFolder | None) -> None:
    """Whether the files that a run took its data from, if they are here, are what they were.

    Data that r1pipe or a package generates is no file: its hash changes with their version. Raises
    CheckpointError.
    """
    config: dict[str, Any] = record.get("config") or (read_object(run.config) if run else {})
    known = (record.get("data") or {}).get("hash")
    if not known and STAGE_TYPES.get(record["stage"]) is not RejectionConfig:  # an early record
        known = record.get("data_hash")
    try:
        data = config.get("data", {})
        if not known or data.get("kind") != "files" or datafiles.hashes(data)[0] == known:
            return
        read = [path for paths in datafiles.located(data).values() for path in paths]
    except (ConfigError, KeyError, TypeError, AttributeError):
        found.problems.append(f"the group `data` of {found.folder}'s config cannot be read")
    except OSError as error:
        found.notes.append(f"{error.filename} cannot be read here ({error.strerror}), and was not checked")
    else:
        absent = [path for path in read if not path.is_file()]
        if absent:
            found.notes.append(f"{listed(absent)}: not here to check")
        else:
            found.problems.append(f"{listed(read)}: not the data that was read")


def listed(paths: list[Path]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"


def contradictions(run: RunFolder, record: Record, path: Path) -> Iterator[str]:
    """Where the record at `path` disagrees with its run folder; after an extension the files are newer."""
    if path != run.record:
        return
    config = read_object(run.config)
    try:
        # the hash in a record without a format was made of other keys
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
    made = record.get("data_hash") if STAGE_TYPES.get(record["stage"]) is RejectionConfig else None
    left = {inside(run.path, name, run.record): sha for name, sha in (record.get("files") or {}).items()}
    diff = record.get("code", {}).get("diff_hash")
    changed = record["history"]["hash"] if "history" in record else None
    for path, sha in ({run.dataset: made} | left | {run.diff: diff, run.config_history: changed}).items():
        if sha and (problem := checkpoints.broken(path, sha)):
            yield problem
