"""A lineage as one HTML file that needs no other: the graph as SVG, below it what each checkpoint is made of.

Time runs from left to right: a checkpoint stands right of all that it came from. Weight edges are whole
lines, data edges dashed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from r1pipe.cli.lineage_tree import facts
from r1pipe.cli.report.style import STYLE
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.runs.lineage.ancestors import Ancestor

WIDTH, HEIGHT, GAP_X, GAP_Y, EDGE = 216, 64, 56, 28, 12  # of a box and between boxes, in SVG units
MORE_STYLE = """
svg.lineage { width: 100%; height: auto; margin: 1.5rem 0; }
svg.lineage rect { fill: var(--raised); stroke: var(--line); }
svg.lineage .broken rect { stroke: #c0392b; stroke-width: 2; }
svg.lineage text { fill: var(--ink); font-size: 12px; }
svg.lineage text.small { fill: var(--muted); font-size: 10px; }
svg.lineage .broken text.state { fill: #c0392b; }
svg.lineage path { fill: none; stroke: var(--s1); stroke-width: 1.6; }
svg.lineage path.data { stroke: var(--s2); stroke-dasharray: 5 4; }
li.problem { color: #c0392b; overflow-wrap: anywhere; }
dl.one { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .86rem; }
dl.one dt { color: var(--muted); } dl.one dd { margin: 0; overflow-wrap: anywhere; }
"""
HASHES = ("config_hash", "data_hash", "tokenizer_hash", "template_hash", "checkpoint_hash", "record_hash")


@dataclass(frozen=True)
class Box:
    """A checkpoint's place in the picture."""

    ancestor: Ancestor
    column: int  # 0 is the checkpoint asked about, at the right; further back is further left
    row: int


def write_page(found: Sequence[Ancestor], path: Path) -> None:
    """Raises EnvironmentProblem where the file cannot be written."""
    try:
        path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}; give another --html") from None


def page(found: Sequence[Ancestor]) -> str:
    once = unique(found)
    title = f"Lineage of {found[0].parent.run_id}"
    broken = [one for one in once if one.problems]
    state = f"{len(broken)} of them broken or changed" if broken else "every hash on the way as recorded"
    lead = f"{len(once)} checkpoints, {state}. Whole lines hand on weights, dashed ones data."
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}{MORE_STYLE}</style>'
    body = f'<h1>{escape(title)}</h1><p class="lead">{lead}</p>{picture(found)}{"".join(map(details, once))}'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def unique(found: Sequence[Ancestor]) -> list[Ancestor]:
    """Each checkpoint once, with whatever is wrong with it on any way to it."""
    once: dict[str, Ancestor] = {}
    for one in found:
        known = once.setdefault(one.parent.checkpoint, one)
        more = tuple(problem for problem in one.problems if problem not in known.problems)
        once[one.parent.checkpoint] = replace(known, problems=known.problems + more)
    return list(once.values())


def boxes(found: Sequence[Ancestor]) -> dict[str, Box]:
    """Checkpoint folder -> place: as many columns back as the longest way to it."""
    columns: dict[str, int] = {}
    edges = [
        (one.child, one.parent.checkpoint) for one in found if one.child and "own ancestor" not in one.problem
    ]
    columns[found[0].parent.checkpoint] = 0
    for _ in found:  # as often as a way can be long
        for child, parent in edges:
            columns[parent] = max(columns.get(parent, 0), columns.get(child, 0) + 1)
    filled: dict[int, int] = {}
    places = {}
    for one in unique(found):
        column = columns.get(one.parent.checkpoint, 0)
        places[one.parent.checkpoint] = Box(one, column, filled.get(column, 0))
        filled[column] = filled.get(column, 0) + 1
    return places


def picture(found: Sequence[Ancestor]) -> str:
    places = boxes(found)
    last = max(box.column for box in places.values())
    rows = 1 + max(box.row for box in places.values())

    def corner(box: Box) -> tuple[int, int]:
        return EDGE + (last - box.column) * (WIDTH + GAP_X), EDGE + box.row * (HEIGHT + GAP_Y)

    lines = []
    for one in found:
        if one.child in places:
            x1, y1 = corner(places[one.parent.checkpoint])
            x2, y2 = corner(places[one.child])
            x1, y1, y2 = x1 + WIDTH, y1 + HEIGHT // 2, y2 + HEIGHT // 2
            bend = GAP_X // 2 + abs(x2 - x1) // 6
            curve = f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
            lines.append(f'<path class="{one.edge}" d="{curve}"><title>{one.edge}</title></path>')
    drawn = "".join(_box(box, *corner(box)) for box in places.values())
    width = 2 * EDGE + last * (WIDTH + GAP_X) + WIDTH
    height = 2 * EDGE + rows * (HEIGHT + GAP_Y) - GAP_Y
    return f'<svg class="lineage" viewBox="0 0 {width} {height}" role="img">{"".join(lines)}{drawn}</svg>'


def _box(box: Box, x: int, y: int) -> str:
    parent, problems = box.ancestor.parent, box.ancestor.problems
    state = "broken" if problems else "ok"
    lines = [
        f'<text x="{x + 10}" y="{y + 20}"><tspan font-weight="600">{_cut(parent.stage, 22)}</tspan></text>',
        f'<text class="small" x="{x + 10}" y="{y + 37}">{_cut(parent.run_id, 36)}</text>',
        f'<text class="small state" x="{x + 10}" y="{y + 53}">{_cut(parent.hash, 12)} {state}</text>',
    ]
    frame = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    return (
        f'<g class="{state}"><title>{escape("; ".join(problems) or "ok")}</title>{frame}{"".join(lines)}</g>'
    )


def _cut(text: str, length: int) -> str:
    return escape(text if len(text) <= length else text[: length - 1] + "…")


def details(ancestor: Ancestor) -> str:
    """All that the record says made one checkpoint, and what is wrong with it."""
    parent, record = ancestor.parent, ancestor.record
    rows = {"checkpoint": parent.checkpoint, "hash": parent.hash}
    rows |= {key: str(record.get("data", {}).get(key)) for key in ("name", "path") if record.get("data")}
    rows |= {key: value for key, value in facts(ancestor).items() if value and key in ("seed", "code")}
    rows |= {name: str(record[name]) for name in HASHES if record.get(name)}
    versions = record.get("versions") or {}
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    numbers = {key: value for key, value in (record.get("metrics") or {}).items() if isinstance(value, float)}
    rows["metrics"] = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    shown = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows.items() if value)
    problems = "".join(f'<li class="problem">{escape(problem)}</li>' for problem in ancestor.problems)
    problems += "".join(f"<li>{escape(note)}</li>" for note in ancestor.notes)
    listed = f"<ul>{problems}</ul>" if problems else ""
    heading = f"<h2>{escape(parent.stage)} {escape(parent.run_id)}</h2>"
    return f'<section>{heading}{listed}<dl class="one">{shown}</dl></section>'
