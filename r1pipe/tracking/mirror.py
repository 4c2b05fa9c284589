"""A run folder mirrored into MLflow while its job runs, without ever holding up the launcher."""

import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import IO

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_secrets
from r1pipe.tracking.store import check_server_answers, failures, first_line, store_uri
from r1pipe.tracking.sync import BEHIND, WHOLE, catch_up, claimed, mark
from r1pipe.tracking.writer import RunWriter

EVERY_S = 3.0  # seconds between looks at the job's lines: one batch for several steps takes less from the job


class Mirror:
    """Keeps the MLflow run of one run folder up to date; does nothing where tracking.enabled is false.

    All work with MLflow happens in one thread, so that neither its import (2 s) nor a slow server is waited
    for. A configured store must open, unless the job is done by then; what fails later is reported once,
    tried again, and never ends the job. What MLflow still lacks when the job has ended comes with the next
    Mirror of any run under the same root, or with `r1pipe sync`.
    """

    def __init__(self, run_folder: Path | str, config: dict, say: Callable[[str], None] | None = None):
        """Raises EnvironmentProblem when a tracking server does not answer.

        Args:
            run_folder: `<root>/<run id>`, its config.json written.
            config: the content of config.json; a login in tracking.uri goes to MLflow alone.
            say: takes the one line about a later failure; standard error by default.
        """
        self.folder = RunFolder(Path(run_folder).resolve())
        self.uri = store_uri(self.folder.path.parent, config["tracking"]["uri"])
        self.config = publishable(config)
        self.say = say or (lambda text: print(text, file=sys.stderr))
        self._address: str | None = None
        self._refusal: str | None = None  # why the store did not open
        self._warned = False
        self._over = Event()
        self._thread: Thread | None = None
        if config["tracking"]["enabled"]:
            check_server_answers(self.uri)
            self._thread = Thread(target=self._follow, name="mlflow", daemon=True)
            self._thread.start()

    def poll(self) -> None:
        """Raises EnvironmentProblem if the store did not open; warns of it where the run is done."""
        if self._refusal is not None and not self.folder.record.exists():
            raise EnvironmentProblem(self._refusal)
        if self._refusal is not None:
            self._warn(self._refusal)

    def finish(self) -> str | None:
        """Waits until all that the job left is logged; `models:/name@stage` if a checkpoint was registered.

        Without record.json the run ends as failed; the next Mirror of this folder takes it up again.
        Raises EnvironmentProblem as `poll` does.
        """
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self.poll()
        return self._address

    def _follow(self) -> None:
        """The thread: opens the store, logs the job's lines every few seconds, and at last what it left."""
        try:
            with claimed(self.folder) as mirrored:
                mark(mirrored, BEHIND)
                writer = RunWriter(self.folder, self.config, self.uri)
                self._attempt(lambda: catch_up(self.folder.path.parent, self.uri))
                while not self._over.wait(EVERY_S):
                    self._attempt(writer.send_lines)
                self._attempt(lambda: self._write_end(writer, mirrored))
        except EnvironmentProblem as problem:
            self._refusal = str(problem)
        except failures() as error:
            self._refusal = self._described(error)

    def _write_end(self, writer: RunWriter, mirrored: IO[str] | None) -> None:
        writer.send_lines()
        self._address = writer.end()
        mark(mirrored, WHOLE)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except failures() as error:
            self._warn(self._described(error))

    def _described(self, error: BaseException) -> str:
        uri, reason = without_secrets(self.uri), without_secrets(first_line(error))
        return f"MLflow at {uri} does not take the run {self.folder.run_id}: {reason}"

    def _warn(self, problem: str) -> None:
        """Reports the first problem."""
        if not self._warned:
            self._warned = True
            state = "the run is done" if self.folder.record.exists() else "training continues"
            self.say(
                f"warning: {problem}; {state}, the run folder has everything, and MLflow gets it with "
                f"`r1pipe sync root={self.folder.path.parent}` or the next run"
            )
