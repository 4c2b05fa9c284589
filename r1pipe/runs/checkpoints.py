"""Checkpoint folders: written to a temporary folder, hashed in manifest.json, renamed into place.

Each rank hashes what it has written, and checks its own share again when a run resumes.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder, inside
from r1pipe.runs import heartbeat
from r1pipe.runs.answers import JOURNAL
from r1pipe.runs.files import read_object, write_json

MANIFEST = "manifest.json"  # {"files": {relative name: sha256}}, written last
ENGINE = "engine"  # DeepSpeed's state in a checkpoint folder: for resume, not needed to load the weights
STEP = re.compile(r"step-(\d+)")
SHARD = re.compile(r"zero_pp_rank_(\d+)_")  # DeepSpeed's name for what a rank alone reads
Hashes = Mapping[str, str]  # name in the checkpoint folder -> SHA-256


class Gathering(Protocol):
    """The ranks of a job (r1pipe.train.engine.ranks.Ranks)."""

    rank: int
    world_size: int

    def all_gather_objects(self, value: Any) -> list[Any]: ...


def file_hash(path: Path) -> str:
    with heartbeat.to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds_work(run: RunFolder) -> bool:
    """Whether a run has a checkpoint or samples, which starting it anew would lose."""
    answers = (*run.data.rglob("*.parquet"), *(run.data / "shards").glob(f"*/*{JOURNAL}"))
    return bool(steps(run.checkpoints)) or bool(answers)


def files_in(folder: Path) -> set[Path]:
    """All files of an unfinished checkpoint, but for a manifest."""
    return {path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST}


def seal(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Have files on the disk; their hashes."""
    hashes = {}
    for path in sorted(paths):
        hashes[path.relative_to(folder).as_posix()] = file_hash(path)
        sync(path)
    return hashes


def write_manifest(folder: Path, hashes: Hashes | None = None) -> None:
    """List every file of a finished checkpoint with its hash, if it is not known yet."""
    known = seal(folder, files_in(folder)) if hashes is None else hashes
    write_json(folder / MANIFEST, {"files": dict(sorted(known.items()))})


def manifest_hash(folder: Path | str) -> str:
    """The hash of a checkpoint's published files, without the state for resume. Raises CheckpointError."""
    return hashlib.sha256(json.dumps(published(Path(folder)), sort_keys=True).encode()).hexdigest()


def published(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of all files but those for resume. Raises CheckpointError."""
    return {name: sha for name, sha in listed(folder).items() if not name.startswith(f"{ENGINE}/")}


def copy_published(source: Path, target: Path) -> None:
    """Copy a checkpoint's published files. Raises CheckpointError."""
    for name in published(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def verify(folder: Path | str, expected_hash: str | None = None, engine: bool = False) -> None:
    """Check a checkpoint's files against its manifest, and the manifest's hash against `expected_hash`.

    `engine`: include the state for resume. Raises CheckpointError naming the file.
    """
    folder = Path(folder)
    for name, sha in (listed(folder) if engine else published(folder)).items():
        problem = broken(folder / name, sha)
        if problem:
            raise CheckpointError(f"{problem}; copy or make the checkpoint again")
    if expected_hash is not None and manifest_hash(folder) != expected_hash:
        raise CheckpointError(f"{folder} has changed since this run was made from it; start anew (--fresh)")


def broken(path: Path, sha: str) -> str | None:
    """Why a file does not have this SHA-256; None if it has."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        return None if file_hash(path) == sha else f"{path} is not what was saved"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def listed(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of a checkpoint's files. Raises CheckpointError, also for a name outside its folder."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}: not a checkpoint, or one never finished")
    files = read_object(manifest).get("files")
    if not isinstance(files, dict) or not all(isinstance(sha, str) for sha in files.values()):
        raise CheckpointError(f"{manifest} cannot be read; copy or make the checkpoint again")
    for name in files:
        inside(folder, name, manifest)
    return files


def steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a run's checkpoints/, oldest first."""
    return [step for step in _folders(folder) if (folder / f"step-{step}" / MANIFEST).is_file()]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(folder: Path) -> list[int]:
    """Steps of all checkpoint folders, finished or not, oldest first."""
    matches = (STEP.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def newest_complete(folder: Path, ranks: Gathering) -> tuple[int | None, list[str]]:
    """Step of the newest intact checkpoint, and the problems of newer ones; (None, []) without checkpoints.
    All ranks call, and each reads its share. Raises CheckpointError if there are checkpoints and none is
    intact."""
    problems: list[str] = []
    for step in reversed(ranks.all_gather_objects(_folders(folder))[0]):
        found = ranks.all_gather_objects(_damage(folder / f"step-{step}", ranks.rank, ranks.world_size))
        problem = next(filter(None, found), None)
        if problem is None:
            return step, problems
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints in {folder} is intact ({problems[0]}); copy one back, "
            "or start the stage anew (--fresh)"
        )
    return None, []


def _damage(folder: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with a rank's share of a checkpoint, or with its manifest."""
    try:
        files = listed(folder)
    except CheckpointError as error:
        return str(error).partition(";")[0]
    found = (broken(folder / name, files[name]) for name in share(files, rank, ranks))
    return next(filter(None, found), None)


def share(names: Collection[str], rank: int, ranks: int) -> list[str]:
    """The files that a rank checks: its own part of the state, and some of those that all share."""
    shards = {name: int(found[1]) for name in names if (found := SHARD.search(name))}
    # the last rank begins, with the weights: rank 0 has most of the state
    others = sorted(set(names) - shards.keys(), reverse=True)
    readers = shards | {name: -1 - place for place, name in enumerate(others)}
    return sorted(name for name, reader in readers.items() if reader % ranks == rank)


def remove_after(folder: Path, step: int) -> None:
    """Rename the later checkpoints, which are damaged, to make room for new ones."""
    for later in _folders(folder):
        if later > step:
            damaged = folder / f".step-{later}.damaged"
            shutil.rmtree(damaged, ignore_errors=True)
            (folder / f"step-{later}").rename(damaged)


def begin(target: Path) -> Path:
    """An empty temporary folder for a checkpoint's files."""
    abandon(target)
    temporary = unfinished(target)
    temporary.mkdir(parents=True)
    return temporary


def abandon(target: Path) -> None:
    shutil.rmtree(unfinished(target), ignore_errors=True)


def unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.unfinished")


def finish(
    target: Path, renaming: AbstractContextManager[None] | None = None, hashes: Hashes | None = None
) -> None:
    """Write the manifest, fsync everything, and, in the block `renaming`, rename the temporary folder to
    `target`. `hashes`: of all files, if ranks have sealed them."""
    temporary = unfinished(target)
    write_manifest(temporary, hashes)
    for path in (temporary / MANIFEST, *filter(Path.is_dir, temporary.rglob("*")), temporary):
        sync(path)
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    with renaming or nullcontext():
        if target.exists():  # the same step was saved before
            target.rename(replaced)
        temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
        heartbeat.tick()
    finally:
        os.close(number)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes the checkpoint at the end of the block; removed after an error."""
    try:
        yield begin(target)
        finish(target)
    finally:
        abandon(target)
