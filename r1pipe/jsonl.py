"""Files of one JSON object per line: read while another process is still appending, or whole and strictly."""

import json
from pathlib import Path
from typing import Any

from r1pipe.errors import CheckpointError

REMEDY = "put the file back from a copy, or start the stage anew (--fresh)"


def metric_lines(path: Path) -> list[tuple[bytes, dict[str, float]]]:
    """Each line of a metrics.jsonl, and what it says; a last line that a kill cut off is left out.

    Raises CheckpointError naming file and line of one that no job wrote so.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {REMEDY}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from None
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # covers bytes that are not UTF-8 too
            why = f"is no JSON ({str(error) or type(error).__name__})"
            raise CheckpointError(f"{path} line {number} {why}; {REMEDY}") from None
        if not _is_metrics(row):
            raise CheckpointError(f"{path} line {number} holds no step with its numbers; {REMEDY}")
        found.append((line + b"\n", row))
    return found


def _is_metrics(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(value) in (int, float) for value in row.values())
    )


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
