"""A run's metrics.jsonl, read whole and strictly: what a resumed run goes on from; no torch."""

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
    temporary = metrics.with_suffix(".partial")
    temporary.write_bytes(b"".join(line for line, _ in kept))
    temporary.replace(metrics)
