"""`r1pipe sync`: bring MLflow up to date with the run folders, or rebuild it from them.

A run folder's file `mirrored` says `behind` or `whole`. The process that writes the run into MLflow locks
that file, so that no two write one run at a time; the lock ends with the process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_login, without_secrets
from r1pipe.runs.files import read_json
from r1pipe.runs.locks import flock
from r1pipe.tracking.store import connect, failures, first_line, matching, store_uri
from r1pipe.tracking.writer import STAGE, RunWriter, search

WHOLE, BEHIND = "whole\n", "behind\n"


def sync(
    root: Path | str, pipeline: str | None = None, uri: str | None = None, rebuild: bool = False
) -> tuple[int, list[str]]:
    """(Number of runs written, ids of those that another process is writing meanwhile.)

    `pipeline`: only that one's runs; `uri`: this store instead of the one in each run's config. `rebuild`
    first deletes the root's runs and model versions, and nothing else in the store. Raises
    EnvironmentProblem.
    """
    stores: dict[str, list[tuple[RunFolder, dict]]] = {}
    for folder, config in tracked(Path(root), pipeline):
        store = store_uri(folder.path.parent, uri or config["tracking"]["uri"])
        stores.setdefault(store, []).append((folder, config))
    written, busy = 0, []
    for store, folders in stores.items():
        try:
            if rebuild:
                forget(store, folders[0][0].path.parent, pipeline)
            for folder, config in folders:
                if write(folder, config, store):
                    written += 1
                else:
                    busy.append(folder.run_id)
        except failures() as error:
            shown, reason = without_secrets(store), without_secrets(first_line(error))
            raise EnvironmentProblem(
                f"MLflow at {shown} does not take the run {folder.run_id}: {reason}; fix it, and sync again"
            ) from None
    return written, busy


def tracked(root: Path, pipeline: str | None = None) -> Iterator[tuple[RunFolder, dict]]:
    """Started runs with tracking, and their configs, in the order in which they finished, or else began."""
    runs = []
    for path in root.resolve().glob("*/config.json"):
        folder, config = RunFolder(path.parent), read_json(path)
        tracking = config.get("tracking")
        is_tracked = isinstance(tracking, dict) and tracking.get("enabled")
        of_jobs = (folder.launcher_log, folder.metrics, folder.record)  # a dry run leaves none of them
        was_started = any(file.exists() for file in of_jobs)
        if is_tracked and was_started and pipeline in (None, config.get("pipeline")):
            began = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
            created = read_json(folder.record).get("created")
            runs.append((str(created or began), folder.run_id, folder, config))
    for *_, folder, config in sorted(runs, key=lambda entry: entry[:2]):
        yield folder, config


@contextmanager
def claimed(folder: RunFolder, wait: bool = True) -> Iterator[IO[str] | None]:
    """The run's file `mirrored`, locked; None if another process holds it and `wait` is false."""
    with folder.mirrored.open("a", encoding="utf-8") as file:
        yield file if flock(file, wait) else None


def mark(mirrored: IO[str] | None, state: str) -> None:
    assert mirrored is not None
    mirrored.truncate(0)
    mirrored.write(state)
    mirrored.flush()


def write(folder: RunFolder, config: dict, uri: str) -> bool:
    """Write one run folder; False if another process is writing it. Raises MLflow's errors."""
    with claimed(folder, wait=False) as mirrored:
        if mirrored is None:
            return False
        writer = RunWriter(folder, publishable(config), uri)
        writer.send_lines()
        writer.end()
        if is_own_store(folder, config, uri):
            mark(mirrored, WHOLE)
    return True


def is_own_store(folder: RunFolder, config: dict, uri: str) -> bool:
    """Whether `uri` is the store that the run's config names, which is written without a login."""
    own = store_uri(folder.path.parent, config["tracking"]["uri"])
    return without_login(own) == without_login(uri)


def catch_up(root: Path, uri: str) -> None:
    """Write the earlier runs under the root that this store does not have completely."""
    for folder, config in tracked(root):
        is_behind = folder.mirrored.exists() and folder.mirrored.read_text(encoding="utf-8") != WHOLE
        if is_behind and is_own_store(folder, config, uri):
            write(folder, config, uri)


def forget(uri: str, root: Path, pipeline: str | None) -> None:
    """Delete from a store the runs of a root, their model versions, and the pipelines that this empties.

    Runs whose folders are gone are deleted too; one that another process is writing is kept. MLflow hides
    deleted runs until `mlflow gc`.
    """
    client, is_root_store = connect(uri), uri == store_uri(root)
    for experiment in client.search_experiments():
        parents = set()
        for run in search(client, experiment.experiment_id, kind=STAGE):
            tags = run.data.tags
            folder = RunFolder(root / tags["r1pipe.run_id"])
            exists = folder.path.is_dir()
            is_ours = exists or is_root_store or tags["r1pipe.root"] == str(root)
            if not is_ours or pipeline not in (None, tags["r1pipe.pipeline"]):
                continue
            with claimed(folder, wait=False) if exists else nullcontext(run) as claim:
                if claim is None:
                    continue
                for version in client.search_model_versions(matching("run_id", run.info.run_id)):
                    client.delete_model_version(version.name, version.version)
                client.delete_run(run.info.run_id)
            parents.add(tags.get("mlflow.parentRunId", ""))
        for parent in parents:
            siblings = matching("tags.mlflow.parentRunId", parent)
            if not client.search_runs([experiment.experiment_id], siblings, max_results=1):
                client.delete_run(parent)
