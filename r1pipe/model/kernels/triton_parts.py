"""Shared parts of the FP8 Triton kernels: scales, counts, and the tokens of a program (V3, 3.3).

A tile's largest magnitude is held as the bits of a float32 without its sign: as integers they are ordered
like the numbers, with infinity and NaN above all others, whereas a maximum of numbers would ignore NaN.
"""

import triton
import triton.language as tl

from r1pipe.model.kernels import reference

TILE = tl.constexpr(reference.TILE)
LARGEST = tl.constexpr(reference.LARGEST)
TO_LARGEST = tl.constexpr(432.0)  # between 416 and 448, which is even
TO_ZERO = tl.constexpr(2.0**-10)  # between 0 and the smallest, which is odd
FLOOR = tl.constexpr(reference.FLOOR)
SIGNLESS = tl.constexpr(0x7FFFFFFF)
TWICE_ONE = tl.constexpr(0x7F000000)
INFINITE = tl.constexpr(0x7F800000)
MANTISSA = tl.constexpr(0x007FFFFF)


@triton.jit
def magnitudes(x):
    """Bits of |x|, int32, of float32."""
    return x.to(tl.int32, bitcast=True) & SIGNLESS


@triton.jit
def scales_of(amax, POWER_OF_TWO: tl.constexpr):
    """Scales of tiles from the bits of their largest magnitudes; `reference.scale_of`."""
    scale = tl.div_rn(tl.maximum(amax.to(tl.float32, bitcast=True), FLOOR), LARGEST)
    if POWER_OF_TWO:  # upwards: the addition carries into the exponent unless the mantissa is zero
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + MANTISSA) & INFINITE).to(tl.float32, bitcast=True)
    return tl.where(amax < INFINITE, scale, float("nan"))


@triton.jit
def scaled_by(x, scale, POWER_OF_TWO: tl.constexpr):
    """x / scale, float32 [...], to be cast to E4M3; `scale` must broadcast to it.

    Nothing is clamped: a quotient exceeds 448 by one float32 rounding at most, which the cast removes.
    """
    if POWER_OF_TWO:  # the inverse is exact: 1's exponent twice, less the scale's
        inverse = (-scale.to(tl.int32, bitcast=True) + TWICE_ONE).to(tl.float32, bitcast=True)
        return x * tl.where(scale == scale, inverse, float("nan"))
    return tl.div_rn(x, scale)


@triton.jit
def _add(counts, number):
    """Most programs have nothing to add, and skip the atomic."""
    tl.atomic_add(counts, number.to(tl.int64), mask=number > 0, sem="relaxed")


@triton.jit
def count(counts, x, scaled):
    """Add to int64 [3] how many of [R, C] get the largest code, become zero, and are not finite.

    It compares the numbers before the cast: comparing many bytes crashes the assembler of CUDA 12.8. Two
    counts of at most 2^14 are summed in one integer.
    """
    largest = (tl.abs(scaled) >= TO_LARGEST).to(tl.int32)
    zero = ((tl.abs(scaled) <= TO_ZERO) & (x != 0)).to(tl.int32)
    both = tl.sum(tl.sum(largest + (zero << 16), axis=1), axis=0)
    _add(counts, both & 0xFFFF)
    _add(counts + 1, both >> 16)
    _add(counts + 2, tl.sum(tl.sum((magnitudes(x) >= INFINITE).to(tl.int32), axis=1), axis=0))


@triton.jit
def groups_of(ends_E, experts, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Each expert's (first token, end, number of groups of `SIZE` tokens), [BLOCK_E], none past the last."""
    ids = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_E + ids, mask=ids < experts, other=0).to(tl.int32)
    firsts = tl.load(ends_E + ids - 1, mask=(ids > 0) & (ids < experts), other=0).to(tl.int32)
    return firsts, ends, (ends - firsts + SIZE - 1) // SIZE


@triton.jit
def group_at(index, ends_E, experts, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first token, end of the expert's) of the group at `index`; past the last group end is 0."""
    ids = tl.arange(0, BLOCK_E)
    firsts, ends, groups = groups_of(ends_E, experts, SIZE, BLOCK_E)
    until = tl.cumsum(groups, 0)
    expert = tl.sum((until <= index).to(tl.int32), axis=0)
    own = ids == expert
    token = tl.sum(tl.where(own, firsts + (index - until + groups) * SIZE, 0), axis=0)
    return expert, token, tl.sum(tl.where(own, ends, 0), axis=0)


def padded_experts(experts: int) -> int:
    """BLOCK_E: a power of two, at least `experts`."""
    return max(16, triton.next_power_of_2(experts))
