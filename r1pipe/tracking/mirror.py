"""A run folder mirrored into MLflow while its job runs, without ever holding up the launcher."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_secrets
from r1pipe.tracking.behind import Hold, catch_up
from r1pipe.tracking.index import Index
from r1pipe.tracking.store import check_server_answers, failures, first_line, store_uri

EVERY_S = 3.0  # seconds between looks at the job's lines: one batch for several steps takes less from the job


class Mirror:
    """Keeps the MLflow run of one run folder up to date; does nothing where tracking.enabled is false.

    All work with MLflow happens in one thread, so that neither its import (2 s) nor a slow server
    is waited for. A configured store must work at the start; what fails later is said once, tried
    again at the next poll, and never ends the job. What MLflow still lacks when the job has ended comes
    with the next Mirror of any run under the same root, or with `r1pipe sync`.
    """

    def __init__(self, run_folder: Path | str, config: dict, say: Callable[[str], None] | None = None):
        """Raises EnvironmentProblem when a tracking server does not answer.

        Args:
            run_folder: `<root>/<run id>`, its config.json written.
            config: the content of config.json; a login in tracking.uri goes to MLflow alone.
            say: takes the one line about a later failure; standard error by default.
        """
        self.folder = RunFolder(Path(run_folder).resolve())
        self.enabled = bool(config["tracking"]["enabled"])
        self.uri = store_uri(self.folder.path.parent, config["tracking"]["uri"])
        self.config = publishable(config)
        self.say = say or (lambda text: print(text, file=sys.stderr))
        self._told = False
        self._looked_at = monotonic()
        self._pending: Future | None = None
        if self.enabled:
            check_server_answers(self.uri)
            self._hold = Hold(self.folder)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
            self._index: Future[Index] = self._thread.submit(self._open)
            self._pending = self._thread.submit(self._guarded, self._catch_up)

    def _open(self) -> Index:
        try:
            self._hold.take()
            self._hold.says_whole(False)
            return Index(self.folder, self.config, self.uri)
        except failures() as error:
            raise EnvironmentProblem(self._problem(error)) from error

    def _problem(self, error: BaseException) -> str:
        uri, reason = without_secrets(self.uri), without_secrets(first_line(error))
        return f"MLflow at {uri} does not take the run {self.folder.run_id}: {reason}"

    def _catch_up(self) -> None:
        if self._index.exception() is None:
            catch_up(self.folder.path.parent, self.uri)

    def poll(self) -> None:
        """Has new lines of metrics.jsonl and tripwires.jsonl logged, without waiting.

        Raises EnvironmentProblem if the store did not open.
        """
        if not self.enabled or not self._index.done():
            return
        index = self._index.result()
        idle = self._pending is None or self._pending.done()
        if idle and monotonic() - self._looked_at >= EVERY_S:
            self._looked_at = monotonic()
            self._pending = self._thread.submit(self._guarded, index.send_lines)

    def drain(self) -> None:
        """Waits until all that the two files hold is logged.

        Raises EnvironmentProblem if the store did not open.
        """
        if self.enabled:
            self._thread.submit(self._guarded, self._index.result().send_lines).result()

    def finish(self) -> str | None:
        """Logs what the job left behind, ends the run; `models:/name@stage` if a checkpoint was registered.

        Without record.json the run ends as failed; the next Mirror of this folder goes on with it.
        Raises EnvironmentProblem if the store did not open.
        """
        if not self.enabled:
            return None
        try:
            self._index.result()
            return self._thread.submit(self._guarded, self._end).result()
        finally:
            self._thread.shutdown()
            self._hold.release()

    def _end(self) -> str | None:
        index = self._index.result()
        index.send_lines()
        address = index.end()
        self._hold.says_whole(True)
        return address

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, or None after telling the first failure."""
        try:
            return work()
        except failures() as error:
            if not self._told:
                self._told = True
                self.say(
                    f"{self._problem(error)}; training goes on, the run folder has everything, and MLflow "
                    f"gets it with `r1pipe sync root={self.folder.path.parent}` or the next run"
                )
            return None
