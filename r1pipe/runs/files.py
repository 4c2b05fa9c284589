"""The files of run folders and checkpoints, for the command line and the jobs: JSON, JSON lines and text.

A file is written whole or not at all: other processes watch for it, and a kill must not leave half of it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from r1pipe.core.errors import CheckpointError

REMEDY = "put the file back from a copy, or start the stage anew (--fresh)"
Row = dict[str, Any]


def read_object(path: Path) -> Row:
    """The JSON object in a file of a checkpoint or run folder. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a checkpoint folder?") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path.parent} is a file; give the folder of a checkpoint") from None
    except (ValueError, RecursionError) as error:  # ValueError covers JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); copy the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_json(path: Path) -> Row:
    """An optional file's JSON object: {} if it is missing or damaged."""
    try:
        return read_object(path)
    except CheckpointError:
        return {}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` at the end of the block, but not after an error."""
    temporary = path.with_suffix(".partial")
    yield temporary
    temporary.replace(path)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def append_line(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class Tail:
    """Reads JSON lines while another process appends them; a half-written last line is left for later.

    A line that is not a JSON object is skipped: a killed job leaves one. A file that became shorter was cut
    by a resumed job and is read again from the start.
    """

    def __init__(self, path: Path, at_end: bool = False):
        self.path = path
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def read(self) -> list[Row]:
        """The rows appended since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self._offset = 0
            file.seek(self._offset)
            appended = file.read()
        complete = appended[: appended.rfind(b"\n") + 1]
        self._offset += len(complete)
        rows = []
        for line in complete.splitlines():
            with suppress(ValueError, RecursionError):  # ValueError covers bytes that are not UTF-8
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]


# --- metrics.jsonl, tripwires.jsonl and dev_evaluations.jsonl, read strictly: a resumed run continues them


def metric_lines(path: Path, numbers_only: bool = True) -> list[tuple[bytes, Row]]:
    """Each complete line of a metrics.jsonl and its row; `numbers_only` is false for the others.

    Raises CheckpointError naming a damaged line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {REMEDY}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from None
    lines = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = f"is not JSON ({str(error) or type(error).__name__})"
            raise CheckpointError(f"{path} line {number} {why}; {REMEDY}") from None
        is_row = isinstance(row, dict) and type(row.get("step")) is int
        if not is_row or (numbers_only and any(type(value) not in (int, float) for value in row.values())):
            raise CheckpointError(f"{path} line {number} does not hold a step and its numbers; {REMEDY}")
        lines.append((line + b"\n", row))
    return lines


def cut_metrics_after(path: Path, step: int) -> None:
    """Drop the lines of later steps and an incomplete last line from a metrics.jsonl.

    Raises CheckpointError where a line of the steps 1..`step` is damaged, missing or there twice.
    """
    if step == 0:
        if path.exists():
            write_bytes(path, b"")
        return
    kept = [(line, row["step"]) for line, row in metric_lines(path) if row["step"] <= step]
    steps = [logged for _, logged in kept]
    if steps != [*range(1, step + 1)]:
        gap = next((n for n, logged in enumerate(steps, 1) if logged != n), len(steps) + 1)
        raise CheckpointError(
            f"{path} is not whole: line {gap} must be step {gap} of the {step} that the checkpoint has; "
            f"{REMEDY}"
        )
    write_bytes(path, b"".join(line for line, _ in kept))


def cut_lines_after(path: Path, step: int) -> None:
    """Drop the lines of later steps from a file that may have none or several for a step.

    Raises CheckpointError naming a damaged line.
    """
    if path.exists():
        lines = metric_lines(path, numbers_only=False)
        write_bytes(path, b"".join(line for line, row in lines if row["step"] <= step))
