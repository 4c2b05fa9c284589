"""The same tokens for every contestant. Standard library alone."""

import random


def rows(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """`count` rows of `length` tokens, none of them 0 or 1 (what pads, and what ends a text)."""
    draw = random.Random(0)
    return [[draw.randrange(2, vocab_size) for _ in range(length)] for _ in range(count)]
