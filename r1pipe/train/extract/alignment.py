"""One text in the tokens of two tokenizers: a teacher's probabilities as probabilities of a student's tokens.

Where both have a token of the same bytes at the same place, the teacher's choice there is the student's, too,
and its likeliest tokens are those of the student with the same bytes; what has none is left over. Elsewhere
nothing is known: to guess how a word would have gone on in other pieces would teach the guess.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

NONE = -1  # the id of no token
_SPACE = "▁"  # SentencePiece's


class TopK(NamedTuple):
    """The likeliest tokens at each of T places, K each, and what they leave over, in natural logarithms."""

    ids_TK: np.ndarray  # int32; NONE: no token
    logprobs_TK: np.ndarray  # float16
    rest_T: np.ndarray  # float16; 0 where nothing is known, as all probability is left over


def unknown(length: int, k: int) -> TopK:
    """Of a text of which nothing is known."""
    return TopK(
        np.full((length, k), NONE, np.int32),
        np.full((length, k), -np.inf, np.float16),
        np.zeros(length, np.float16),
    )


def aligned(
    ours: Sequence[bytes],
    theirs: Sequence[bytes],
    likely: Sequence[Sequence[tuple[bytes, float]]],
    ids: dict[bytes, int],
    k: int,
) -> TopK | None:
    """The teacher's probabilities at each of our tokens. None where the two are of different texts.

    `ours` and `theirs`: the tokens of one text, which theirs may have more around; `likely`: at each of
    theirs the likeliest tokens with their log-probabilities; `ids`: our tokens by their bytes.
    """
    begin = b"".join(theirs).find(b"".join(ours))
    if begin < 0:
        return None
    found = unknown(len(ours), k)
    places = {span: i for i, span in enumerate(pairwise(accumulate(map(len, theirs), initial=0)))}
    for t, span in enumerate(pairwise(accumulate(map(len, ours), initial=begin))):
        if span in places and span[0] < span[1]:
            _fill(found, t, likely[places[span]], ids)
    return found


def _fill(found: TopK, t: int, likely: Sequence[tuple[bytes, float]], ids: dict[bytes, int]) -> None:
    top: dict[int, float] = {}
    for piece, logprob in likely:
        if piece in ids:  # two of theirs may be one of ours, as tokens that end an answer
            top[ids[piece]] = float(np.logaddexp(top.get(ids[piece], -np.inf), logprob))
    for i, (token, logprob) in enumerate([*top.items()][: found.ids_TK.shape[1]]):
        found.ids_TK[t, i], found.logprobs_TK[t, i] = token, logprob
    mass = float(np.exp(found.logprobs_TK[t].astype(np.float64)).sum())
    found.rest_T[t] = np.log1p(-mass) if mass < 1 else -np.inf


def pieces_of(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token by its id; b"" where an id has none. A special token has those of its text."""
    special = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    is_bytes = "Ġ" in vocabulary or "Ċ" in vocabulary
    found = [b""] * (1 + max(vocabulary.values(), default=-1))
    for token, number in vocabulary.items():
        if number in special:
            found[number] = special[number].encode()
        elif is_bytes:
            found[number] = bytes(_byte_of()[sign] for sign in token if sign in _byte_of())
        elif len(token) == 6 and token.startswith("<0x"):
            found[number] = bytes([int(token[3:5], 16)])
        else:
            found[number] = token.replace(_SPACE, " ").encode()
    return found


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + n): byte for n, byte in enumerate(others)}
