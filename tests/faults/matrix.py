"""Exact resume, stage by stage: N steps in one go against k steps, kill -9 and the same command again.

Every stage on one and on two ranks, at each ZeRO level, killed at every point that it comes by; which call of
the point is drawn from the seed. Half of them save from copies, beside training. The short form is one case;
tests/test_resume.py has more.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from faults.lab import BESIDE, POINTS, Lab, Shape
from faults.outcome import Outcome

RANKS, LEVELS = (1, 2), (0, 1, 2, 3)

log = logging.getLogger("faults")


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    """A row for each stage and number of ranks: every point's kill at every level."""
    lab = Lab(folder)
    if short:
        yield outcome(lab, [Shape("cold_start", 2, 1)], seed, ["manifest written, name not"])
        return
    for stage, ranks in product(POINTS, RANKS):
        shapes = [Shape(stage, ranks, level, BESIDE * ((ranks + level) % 2)) for level in LEVELS]
        yield outcome(lab, shapes, seed, [*POINTS[stage]])


def outcome(lab: Lab, shapes: Sequence[Shape], seed: int, points: Sequence[str]) -> Outcome:
    """A kill at each point of each shape, which are of one stage."""
    tried, lost = 0, []
    for shape, point in product(shapes, points):
        log.info("%s: %s (%d tried)", shape, point, tried)
        tried += 1
        lost += loss(lab, shape, point, seed)
    levels = ", ".join(str(shape.zero_level) for shape in shapes)
    return Outcome(
        f"kill -9 of a rank: {shapes[0].stage}, {shapes[0].ranks} rank{'s' * (shapes[0].ranks > 1)}",
        tried=tried,
        held=tried - len(lost),
        told=lost[0] if lost else f"the same bits, ZeRO {levels}",
    )


def loss(lab: Lab, shape: Shape, point: str, seed: int) -> list[str]:
    """One line on what was lost, or none."""
    kill = lab.moment(shape, point, seed)
    found = lab.killed(shape, kill)
    return [f"{shape}, {point}, call {kill.nth}: {found[0]} ({len(found)} in all)"] if found else []
