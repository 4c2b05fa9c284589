"""A lineage in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from r1pipe.runs.lineage.ancestors import Ancestor


def show(found: list[Ancestor]) -> None:
    """Print the checkpoint and its ancestors as a tree."""
    from rich.console import Console
    from rich.tree import Tree

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
    code = record.get("code", {})
    revision, data, seed = code.get("revision"), record.get("data_hash"), record.get("seed")
    changed = " with changes" if code.get("dirty") else ""
    return {
        "seed": f"seed {seed}" if seed is not None else "",
        "code": f"code {revision[:10]}{changed}" if revision else "",
        "data": f"data {data[:12]}" if data else "",
        "place": ancestor.parent.checkpoint,
    }
