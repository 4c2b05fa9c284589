"""What all contestants share: the tokens, what pads and ends a text. Standard library alone."""

import random

PAD, EOS = 0, 1


def rows(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """`count` rows of `length` tokens, none of them PAD or EOS."""
    draw = random.Random(0)
    return [[draw.randrange(EOS + 1, vocab_size) for _ in range(length)] for _ in range(count)]
