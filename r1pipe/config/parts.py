"""Which layers the ranks of a pipeline have: what trains, checks and plans one agrees on it here."""

from itertools import pairwise


def layers_of(layers: int, count: int) -> list[range]:
    """Which layers each of `count` parts has: as many, the first ones one more where it does not divide."""
    size, more = divmod(layers, count)
    ends = [number * size + min(number, more) for number in range(count + 1)]
    return [range(*pair) for pair in pairwise(ends)]


def rank_of(schedule: str, ranks: int) -> list[int]:
    """The rank of each part of a model."""
    there = [*range(ranks)]
    return there if schedule == "1f1b" else there + there[::-1]
