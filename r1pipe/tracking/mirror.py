"""Keeps MLflow up to date with the run folders: each while its job runs, and all with `r1pipe sync`.

A run folder's file `mirrored` says `behind` or `whole`. The process that writes the run into MLflow locks
that file, so that no two write one run at a time; the lock ends with the process.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import IO

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_login, without_secrets
from r1pipe.runs.files import read_json
from r1pipe.runs.locks import flock
from r1pipe.tracking.store import check_server_answers, connect, failures, first_line, matching, store_uri
from r1pipe.tracking.writer import STAGE, RunWriter, search

WHOLE, BEHIND = "whole\n", "behind\n"
EVERY_S = 3.0  # seconds between batches: one batch for several steps takes less time from the job


class Mirror:
    """Keeps the MLflow run of one run folder up to date; does nothing where tracking.enabled is false.

    All work with MLflow happens in one thread, so that nothing waits for its import (2 s) or a slow server.
    The store must open, unless the job is done by then; a later failure is reported once, retried, and never
    ends the job. What MLflow still lacks when the job has ended is written by the next Mirror of any run
    under the same root, or by `r1pipe sync`.
    """

    def __init__(self, run_folder: Path | str, config: dict, say: Callable[[str], None] | None = None):
        """`config`: the content of config.json, already written; a login in its uri goes to MLflow alone.
        `say` gets the line about a later failure. Raises EnvironmentProblem when a server does not answer."""
        self.folder = RunFolder(Path(run_folder).resolve())
        self.uri = store_uri(self.folder.path.parent, config["tracking"]["uri"])
        self.config = publishable(config)
        self.say = say or (lambda text: print(text, file=sys.stderr))
        self._address: str | None = None
        self._store_error: str | None = None  # why the store did not open
        self._warned = False
        self._ended = Event()
        self._thread: Thread | None = None
        if config["tracking"]["enabled"]:
            check_server_answers(self.uri)
            self._thread = Thread(target=self._follow, name="mlflow", daemon=True)
            self._thread.start()

    def poll(self) -> None:
        """Raises EnvironmentProblem if the store did not open; only warns if the run is done."""
        if self._store_error is not None:
            if not self.folder.record.exists():
                raise EnvironmentProblem(self._store_error)
            self._warn(self._store_error)

    def finish(self) -> str | None:
        """Wait until everything is logged; `models:/name@stage` if a checkpoint was registered.

        Without record.json the run ends as failed; the next Mirror of this folder continues it.
        Raises EnvironmentProblem as `poll` does.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self.poll()
        return self._address

    def _follow(self) -> None:
        """The thread: opens the store, logs the job's lines every few seconds, and its results at the end."""
        try:
            with claimed(self.folder) as mirrored:
                mark(mirrored, BEHIND)
                writer = RunWriter(self.folder, self.config, self.uri)

                def write_end() -> None:
                    writer.send_lines()
                    self._address = writer.end()
                    mark(mirrored, WHOLE)

                self._attempt(lambda: catch_up(self.folder.path.parent, self.uri))
                while not self._ended.wait(EVERY_S):
                    self._attempt(writer.send_lines)
                self._attempt(write_end)
        except EnvironmentProblem as problem:
            self._store_error = str(problem)
        except failures() as error:
            self._store_error = refusal(self.uri, self.folder, error)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except failures() as error:
            self._warn(refusal(self.uri, self.folder, error))

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            state = "the run is done" if self.folder.record.exists() else "training continues"
            self.say(
                f"warning: {problem}; {state}, the run folder has everything, and MLflow gets it with "
                f"`r1pipe sync root={self.folder.path.parent}` or the next run"
            )


def sync(
    root: Path | str, pipeline: str | None = None, uri: str | None = None, rebuild: bool = False
) -> tuple[int, list[str]]:
    """(Number of runs written, ids of those that another process is writing meanwhile.)

    `pipeline`: only that one's runs; `uri`: this store instead of the one in each run's config. `rebuild`
    first deletes the root's runs and model versions, and nothing else in the store. Raises
    EnvironmentProblem.
    """
    written, busy, emptied = 0, [], set()
    for folder, config in tracked(Path(root), pipeline):
        store = store_uri(folder.path.parent, uri or config["tracking"]["uri"])
        try:
            if rebuild and store not in emptied:
                forget(store, folder.path.parent, pipeline)
                emptied.add(store)
            if write(folder, config, store):
                written += 1
            else:
                busy.append(folder.run_id)
        except failures() as error:
            raise EnvironmentProblem(f"{refusal(store, folder, error)}; fix it, and sync again") from None
    return written, busy


def refusal(uri: str, folder: RunFolder, error: BaseException) -> str:
    reason = without_secrets(first_line(error))
    return f"MLflow at {without_secrets(uri)} does not take the run {folder.run_id}: {reason}"


def tracked(root: Path, pipeline: str | None = None) -> list[tuple[RunFolder, dict]]:
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
    return [(folder, config) for *_, folder, config in sorted(runs, key=lambda entry: entry[:2])]


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
