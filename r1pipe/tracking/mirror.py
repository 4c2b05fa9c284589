"""Mirrors a run folder into MLflow while its job runs, without ever blocking the launcher."""

import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_secrets
from r1pipe.tracking.store import check_server_answers, failures, first_line, store_uri
from r1pipe.tracking.sync import BEHIND, WHOLE, catch_up, claimed, mark
from r1pipe.tracking.writer import RunWriter

EVERY_S = 3.0  # seconds between batches: one batch for several steps takes less time from the job


class Mirror:
    """Keeps the MLflow run of one run folder up to date; does nothing where tracking.enabled is false.

    All work with MLflow happens in one thread, so that nothing waits for its import (2 s) or a slow server.
    The store must open, unless the job is done by then; a later failure is reported once, retried, and never
    ends the job. What MLflow still lacks when the job has ended is written by the next Mirror of any run
    under the same root, or by `r1pipe sync`.
    """

    def __init__(self, run_folder: Path | str, config: dict, say: Callable[[str], None] | None = None):
        """Raises EnvironmentProblem when a tracking server does not answer.

        Args:
            run_folder: `<root>/<run id>`, its config.json written.
            config: the content of config.json; a login in tracking.uri goes to MLflow alone.
            say: receives the one line about a later failure; prints to standard error by default.
        """
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
            self._store_error = self._describe(error)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except failures() as error:
            self._warn(self._describe(error))

    def _describe(self, error: BaseException) -> str:
        uri, reason = without_secrets(self.uri), without_secrets(first_line(error))
        return f"MLflow at {uri} does not take the run {self.folder.run_id}: {reason}"

    def _warn(self, problem: str) -> None:
        """Report the first problem only."""
        if not self._warned:
            self._warned = True
            state = "the run is done" if self.folder.record.exists() else "training continues"
            self.say(
                f"warning: {problem}; {state}, the run folder has everything, and MLflow gets it with "
                f"`r1pipe sync root={self.folder.path.parent}` or the next run"
            )
