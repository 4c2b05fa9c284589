"""A lineage in the terminal, and as one HTML file that needs no other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from r1pipe.cli.report.page import render
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.runs.lineage.ancestors import Ancestor
from r1pipe.runs.record import code_version

HASHES = ("config_hash", "data_hash", "tokenizer_hash", "template_hash", "checkpoint_hash", "record_hash")


def show(found: Sequence[Ancestor]) -> None:
    """Print the checkpoint and its ancestors as a tree."""
    branches: list[Tree] = []
    for ancestor in found:
        label = described(ancestor)
        del branches[ancestor.depth :]
        branches.append(branches[-1].add(label) if branches else Tree(label))
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no edge to wrap at
        console.width = max(
            4 * one.depth + len(line) for one in found for line in described(one).plain.split("\n")
        )
    console.print(branches[0])


def described(ancestor: Ancestor) -> Text:
    """Edge, stage, run and hash in one line; each problem and note in its own; code, data and place below."""
    parent = ancestor.parent
    label = Text.assemble((f"{ancestor.edge}: " if ancestor.edge else "", "dim"), (parent.stage, "bold"))
    label.append(f"  {parent.run_id}  {parent.hash[:12]}  ")
    if ancestor.shown:
        return label.append("as above", "dim" if not ancestor.problems else "red")
    label.append(*(("broken", "red") if ancestor.problems else ("ok", "green")))
    for problem in ancestor.problems:
        label.append(f"\n{problem}", "red")
    for note in ancestor.notes:
        label.append(f"\n{note}", "yellow")
    return label.append("\n" + "  ".join(filter(None, [*facts(ancestor).values()])), "dim")


def facts(ancestor: Ancestor) -> dict[str, str]:
    """What the record says made it, in short; "" where it has nothing."""
    record: Mapping[str, Any] = ancestor.record or {}
    code, data, seed = code_version(record, 10), record.get("data_hash"), record.get("seed")
    return {
        "seed": f"seed {seed}" if seed is not None else "",
        "code": f"code {code}" if code else "",
        "data": f"data {data[:12]}" if data else "",
        "place": ancestor.parent.checkpoint,
    }


def teacher_line(teacher: Mapping[str, Any]) -> str:
    """The teacher of a student, under which licence, and what it took; "" without a teacher."""
    if not teacher:
        return ""
    took = f"{teacher['requests']} requests, {teacher['completion_tokens']} tokens, {teacher['usd']:.2f} USD"
    licence = teacher["licence"] or "licence unknown"
    return f"{teacher['name']} {teacher['version'][:12]} ({licence}), {teacher['prompts']} prompts, {took}"


def write_page(found: Sequence[Ancestor], path: Path) -> None:
    """Raises EnvironmentProblem where the file cannot be written."""
    try:
        path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}; give another --html") from None


def page(found: Sequence[Ancestor]) -> str:
    """The tree, and below it what each checkpoint is made of."""
    once: dict[str, Ancestor] = {}  # each checkpoint with whatever is wrong with it on any path to it
    for ancestor in found:
        known = once.setdefault(ancestor.parent.checkpoint, ancestor)
        more = tuple(problem for problem in ancestor.problems if problem not in known.problems)
        once[ancestor.parent.checkpoint] = replace(known, problems=known.problems + more)
    broken = sum(bool(checkpoint.problems) for checkpoint in once.values())
    return render(
        "lineage.html",
        title=f"Lineage of {found[0].parent.run_id}",
        state=f"{broken} of them broken or changed" if broken else "every hash on the way as recorded",
        found=found,
        checkpoints=list(once.values()),
        details=details,
    )


def details(ancestor: Ancestor) -> dict[str, str]:
    """All that the record says made one checkpoint."""
    record: Mapping[str, Any] = ancestor.record or {}
    data, versions, metrics = (record.get(name) or {} for name in ("data", "versions", "metrics"))
    shown = facts(ancestor)
    numbers = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, float)]
    return {
        "checkpoint": ancestor.parent.checkpoint,
        "hash": ancestor.parent.hash,
        "data": " ".join(filter(None, [data.get("name"), data.get("path")])),
        "seed": shown["seed"],
        "code": shown["code"],
        **{name: record.get(name) or "" for name in HASHES},
        "teacher": teacher_line(record.get("teacher") or {}),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "metrics": ", ".join(numbers),
    }
