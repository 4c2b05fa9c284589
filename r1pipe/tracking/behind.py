"""Run folders that MLflow does not have wholly: which they are, who is at one, and how they are made good.

A run folder's file `mirrored` says `behind` or `whole`. Whoever mirrors the run holds a lock on that file, so
that no two processes write one run into MLflow at a time; the lock goes with its process, however that ends.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from r1pipe.cli.compare import read_json
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_login
from r1pipe.tracking.index import Index
from r1pipe.tracking.store import store_uri

WHOLE, BEHIND = "whole\n", "behind\n"


class Hold:
    """The lock on a run folder's mirror."""

    def __init__(self, folder: RunFolder):
        self._path = folder.mirrored
        self._file: int | None = None

    def take(self, wait: bool = True) -> bool:
        """Whether it is held now; without `wait`, False where another process has it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._file = descriptor
        return True

    def says_whole(self, whole: bool) -> None:
        assert self._file is not None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, (WHOLE if whole else BEHIND).encode(), 0)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)  # closing lets go of the lock
            self._file = None


def write(folder: RunFolder, config: dict, uri: str) -> bool:
    """One whole run folder into MLflow; False where another process is at it. Raises what MLflow raises."""
    hold = Hold(folder)
    if not hold.take(wait=False):
        return False
    try:
        index = Index(folder, publishable(config), uri)
        index.send_lines()
        index.end()
        if is_own_store(folder, config, uri):
            hold.says_whole(True)
    finally:
        hold.release()
    return True


def is_own_store(folder: RunFolder, config: dict, uri: str) -> bool:
    """Whether `uri` is the store that the run's config names; what is written of it has no login."""
    own = store_uri(folder.path.parent, config["tracking"]["uri"])
    return without_login(own) == without_login(uri)


def tracked(root: Path, pipeline: str | None = None) -> Iterator[tuple[RunFolder, dict]]:
    """Run folders with their configs where tracking is on, those that finished first before the others."""
    found = []
    for path in Path(root).resolve().glob("*/config.json"):
        folder, config = RunFolder(path.parent), read_json(path)
        tracking = config.get("tracking")
        if not isinstance(tracking, dict) or not tracking.get("enabled"):
            continue
        if pipeline in (None, config.get("pipeline")):
            created = read_json(folder.record).get("created")
            found.append((str(created or "~"), path.stat().st_mtime, folder.run_id, folder, config))
    for *_, folder, config in sorted(found, key=lambda entry: entry[:3]):
        yield folder, config


def catch_up(root: Path, uri: str) -> int:
    """Writes what earlier runs under the root left behind into the same store; how many there were."""
    made_good = 0
    for folder, config in tracked(root):
        if is_behind(folder) and is_own_store(folder, config, uri):
            made_good += write(folder, config, uri)
    return made_good


def is_behind(folder: RunFolder) -> bool:
    return folder.mirrored.exists() and folder.mirrored.read_text(encoding="utf-8") != WHOLE
