"""Checkpoint folders: written to a temporary folder, hashed in manifest.json, renamed into place."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder, inside
from r1pipe.runs import heartbeat
from r1pipe.runs.files import read_object, write_json

MANIFEST = "manifest.json"  # {"files": {relative name: sha256}}, written last
ENGINE = "engine"  # DeepSpeed's state in a checkpoint folder: for resume, not needed to load the weights
STEP = re.compile(r"step-(\d+)")


def file_hash(path: Path) -> str:
    with heartbeat.to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds_work(run: RunFolder) -> bool:
    """Whether a run has a checkpoint or samples, which starting it anew would lose."""
    return bool(steps(run.checkpoints)) or any(run.data.rglob("*.parquet"))


def write_manifest(folder: Path) -> None:
    """List every file of a finished checkpoint with its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    write_json(folder / MANIFEST, {"files": hashes})


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


def newest_complete(folder: Path) -> tuple[int | None, list[str]]:
    """Step of the newest intact checkpoint, and the problems of newer ones; (None, []) without checkpoints.

    Raises CheckpointError if there are checkpoints and none is intact.
    """
    problems: list[str] = []
    for step in reversed(_folders(folder)):
        try:
            verify(folder / f"step-{step}", engine=True)
        except CheckpointError as error:
            problems.append(str(error).partition(";")[0])
        else:
            return step, problems
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints in {folder} is intact ({problems[0]}); copy one back, "
            "or start the stage anew (--fresh)"
        )
    return None, []


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


def finish(target: Path, renaming: AbstractContextManager[None] | None = None) -> None:
    """Write the manifest, fsync everything, and, in the block `renaming`, rename the temporary folder to
    `target`."""
    temporary = unfinished(target)
    write_manifest(temporary)
    for path in (*temporary.rglob("*"), temporary):
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
