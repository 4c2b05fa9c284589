"""`r1pipe sync`: MLflow brought up to the run folders, or made again from them.

A run folder's file `mirrored` says `behind` or `whole`. Whoever writes the run into MLflow holds a lock on
that file, so that no two processes write one run at a time; the lock goes with its process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from r1pipe.cli.compare import read_json
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_login, without_secrets
from r1pipe.tracking.database import lock
from r1pipe.tracking.store import connect, failures, first_line, matching, store_uri
from r1pipe.tracking.writer import RunWriter, search

WHOLE, BEHIND = "whole\n", "behind\n"


def sync(
    root: Path | str, pipeline: str | None = None, uri: str | None = None, rebuild: bool = False
) -> tuple[int, list[str]]:
    """(Runs that MLflow now has wholly, ids of those that another process is writing meanwhile.)

    `pipeline`: that one's runs alone; `uri`: into this store, instead of the one that each run's config
    names. `rebuild` first deletes what the store has of these run folders, runs and model versions, and
    nothing else in it. Raises EnvironmentProblem.
    """
    stores: dict[str, list[tuple[RunFolder, dict]]] = {}
    for folder, config in tracked(Path(root), pipeline):
        store = store_uri(folder.path.parent, uri or config["tracking"]["uri"])
        stores.setdefault(store, []).append((folder, config))
    written, busy = 0, []
    for store, folders in stores.items():
        try:
            if rebuild:
                forget(folders, store)
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
    """Run folders with their configs where tracking is on and a job was started, in the order in which they
    finished; one that has not finished counts by its start."""
    found = []
    for path in root.resolve().glob("*/config.json"):
        folder, config = RunFolder(path.parent), read_json(path)
        tracking = config.get("tracking")
        is_tracked = isinstance(tracking, dict) and tracking.get("enabled")
        if is_tracked and was_started(folder) and pipeline in (None, config.get("pipeline")):
            began = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
            created = read_json(folder.record).get("created")
            found.append((str(created or began), folder.run_id, folder, config))
    for *_, folder, config in sorted(found, key=lambda entry: entry[:2]):
        yield folder, config


def was_started(folder: RunFolder) -> bool:
    """A dry run leaves a folder, too, but no job has written anything into it."""
    return any(path.exists() for path in (folder.launcher_log, folder.metrics, folder.record))


@contextmanager
def claimed(folder: RunFolder, wait: bool = True) -> Iterator[IO[str] | None]:
    """The run's file `mirrored`, locked; without `wait`, None where another process has it."""
    with folder.mirrored.open("a", encoding="utf-8") as file:
        yield file if lock(file, wait) else None


def mark(mirrored: IO[str] | None, state: str) -> None:
    assert mirrored is not None
    mirrored.truncate(0)
    mirrored.write(state)
    mirrored.flush()


def write(folder: RunFolder, config: dict, uri: str) -> bool:
    """One whole run folder into MLflow; False where another process is at it. Raises what MLflow raises."""
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
    """Write what earlier runs under the root left behind into the same store."""
    for folder, config in tracked(root):
        is_behind = folder.mirrored.exists() and folder.mirrored.read_text(encoding="utf-8") != WHOLE
        if is_behind and is_own_store(folder, config, uri):
            write(folder, config, uri)


def forget(folders: "list[tuple[RunFolder, dict]]", uri: str) -> None:
    """Delete what a store has of run folders: runs, the model versions that they made, and emptied pipelines.

    A run that another process is writing stays. MLflow keeps deleted runs out of sight until `mlflow gc`.
    """
    client = connect(uri)
    parents = set()
    for folder, config in folders:
        experiment = client.get_experiment_by_name(config["tracking"]["experiment"])
        with claimed(folder, wait=False) as mirrored:
            if experiment is None or mirrored is None:
                continue
            for run in search(client, experiment.experiment_id, run_id=folder.run_id):
                for version in client.search_model_versions(matching("run_id", run.info.run_id)):
                    client.delete_model_version(version.name, version.version)
                client.delete_run(run.info.run_id)
                parents.add((experiment.experiment_id, run.data.tags.get("mlflow.parentRunId", "")))
    for experiment_id, parent in parents:
        if not client.search_runs(
            [experiment_id], matching("tags.mlflow.parentRunId", parent), max_results=1
        ):
            client.delete_run(parent)
