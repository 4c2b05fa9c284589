"""A lineage as one HTML file that needs no other: the tree, below it what each checkpoint is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1pipe.cli.lineage_tree import facts
from r1pipe.cli.report.html import render
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.runs.lineage.ancestors import Ancestor

HASHES = ("config_hash", "data_hash", "tokenizer_hash", "template_hash", "checkpoint_hash", "record_hash")


def write_page(found: Sequence[Ancestor], path: Path) -> None:
    """Raises EnvironmentProblem where the file cannot be written."""
    try:
        path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}; give another --html") from None


def page(found: Sequence[Ancestor]) -> str:
    checkpoints = unique(found)
    broken = sum(bool(checkpoint.problems) for checkpoint in checkpoints)
    return render(
        "lineage.html",
        title=f"Lineage of {found[0].parent.run_id}",
        state=f"{broken} of them broken or changed" if broken else "every hash on the way as recorded",
        found=found,
        checkpoints=checkpoints,
        details=details,
    )


def unique(found: Sequence[Ancestor]) -> list[Ancestor]:
    """Each checkpoint once, with whatever is wrong with it on any way to it."""
    once: dict[str, Ancestor] = {}
    for ancestor in found:
        known = once.setdefault(ancestor.parent.checkpoint, ancestor)
        more = tuple(problem for problem in ancestor.problems if problem not in known.problems)
        once[ancestor.parent.checkpoint] = replace(known, problems=known.problems + more)
    return list(once.values())


def details(ancestor: Ancestor) -> dict[str, str]:
    """All that the record says made one checkpoint."""
    record: Mapping[str, Any] = ancestor.record or {}
    data, versions, metrics = (record.get(name) or {} for name in ("data", "versions", "metrics"))
    shown = facts(ancestor)
    return {
        "checkpoint": ancestor.parent.checkpoint,
        "hash": ancestor.parent.hash,
        "data": " ".join(filter(None, [data.get("name"), data.get("path")])),
        "seed": shown["seed"],
        "code": shown["code"],
        **{name: record.get(name) or "" for name in HASHES},
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "metrics": ", ".join(
            f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, float)
        ),
    }
