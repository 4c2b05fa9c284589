"""A run's metrics.jsonl and tripwires.jsonl, read strictly: what a resumed run goes on from."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from r1pipe.core.errors import CheckpointError

REMEDY = "put the file back from a copy, or start the stage anew (--fresh)"


def metric_lines(path: Path) -> list[tuple[bytes, dict[str, float]]]:
    """Each line of a metrics.jsonl, and what it says; a last line that a kill cut off is left out.

    Raises CheckpointError naming file and line of one that no job wrote so.
    """
    return list(_lines(path, _is_metrics))


def _lines(path: Path, is_row: Callable[[Any], bool]) -> Iterator[tuple[bytes, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {REMEDY}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from None
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # covers bytes that are not UTF-8 too
            why = f"is no JSON ({str(error) or type(error).__name__})"
            raise CheckpointError(f"{path} line {number} {why}; {REMEDY}") from None
        if not is_row(row):
            raise CheckpointError(f"{path} line {number} holds no step with its numbers; {REMEDY}")
        yield line + b"\n", row


def _is_metrics(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(value) in (int, float) for value in row.values())
    )


def _is_trip(row: Any) -> bool:
    return isinstance(row, dict) and type(row.get("step")) is int


def cut_after(metrics: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that was cut off by a kill; without a step, all.

    Raises CheckpointError where a line of the steps up to this one is damaged, missing or twice there.
    """
    if step == 0 and not metrics.exists():
        return
    kept = [(line, row["step"]) for line, row in metric_lines(metrics) if row["step"] <= step] if step else []
    steps = [of for _, of in kept]
    if steps != [*range(1, step + 1)]:
        gap = next((n for n, of in enumerate(steps, 1) if of != n), len(steps) + 1)
        raise CheckpointError(
            f"{metrics} is not whole: line {gap} must be step {gap} of the {step} that the checkpoint has; "
            f"{REMEDY}"
        )
    _write(metrics, [line for line, _ in kept])


def cut_trips_after(trips: Path, step: int) -> None:
    """Drop the lines of later steps, of which there may be none or several, from a tripwires.jsonl.

    Raises CheckpointError naming file and line of one that no job wrote so.
    """
    if trips.exists():
        _write(trips, [line for line, row in _lines(trips, _is_trip) if row["step"] <= step])


def _write(path: Path, lines: list[bytes]) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(b"".join(lines))
    temporary.replace(path)
