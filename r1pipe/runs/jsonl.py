"""Reading files of one JSON object per line while another process is still appending to them."""

import json
from pathlib import Path


class Tail:
    """Gives the complete lines appended since the last call; a half-written line waits for its rest.

    A line that is not a JSON object is skipped and counted in `bad` (a job that was killed while
    writing leaves one). A file that became shorter was cut back by a resumed job: it is read from
    the start again.
    """

    def __init__(self, path: Path, at_end: bool = False):
        self.path = path
        self.bad = 0
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def read(self) -> list[dict]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self._offset = 0
            file.seek(self._offset)
            fresh = file.read()
        complete = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [row for line in complete.splitlines() if (row := self._parse(line)) is not None]

    def _parse(self, line: bytes) -> dict | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # covers bytes that are not UTF-8 too
            row = None
        if not isinstance(row, dict):
            self.bad += 1
            return None
        return row
