"""Products of FP8 matrices in Triton, on tensor cores of Hopper and newer; see reference.py.

Hopper's tensor cores accumulate FP8 products in about 14 bits. So 128 of them are summed from zero, then
scaled and added to the result in float32: V3's promotion (section 3.3.2). If K is no multiple of 16, loads
are of single bytes: correct, but slow.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1pipe.model.kernels.reference import Scaled
from r1pipe.model.kernels.triton_parts import TILE, group_at, groups_of, padded_experts

# Rows and columns of a program, its warps, and its loads of 128 in flight. Small programs share a
# multiprocessor, so that one uses the tensor cores while another promotes.
CONFIGS = [
    triton.Config({"BLOCK_M": rows, "BLOCK_N": columns, "BAND": 8}, num_warps=warps, num_stages=stages)
    for rows, columns, warps, stages in (
        (64, 64, 4, 4),
        (64, 128, 4, 3),
        (64, 128, 4, 4),
        (128, 64, 4, 3),
        (128, 64, 4, 4),
        (128, 128, 8, 3),
        (128, 128, 8, 4),
    )
]
# Tuning in the interpreter would time numpy.
_CHOICE = CONFIGS[:1] if triton.knobs.runtime.interpret else CONFIGS


@triton.jit
def _place_of(index, tall, wide, BAND: tl.constexpr):
    """(row, column) of the index-th program of tall x wide: bands of rows share reads in the L2 cache."""
    band = index // (BAND * wide) * BAND
    height = tl.minimum(tall - band, BAND)
    within = index % (BAND * wide)
    return band + within % height, within // height


@triton.jit
def _product(
    a,
    b,
    a_scales,
    b_scales,
    out,
    rows,
    columns,
    depth,
    stride,
    stride_a_row,
    stride_a_tile,
    stride_b_row,
    stride_b_tile,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the program's part, at most [BLOCK_M, BLOCK_N], of a [., K] in tiles times b [., K].

    b is in tiles or within one row of BLOCKS; rows are `stride` apart. All pointers are to the first row and
    column of the part, so that offsets fit into 32 bits.
    """
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, TILE)
    # Rows past the end are read as the last one, and not written.
    at_a = tl.minimum(m, rows - 1)[:, None] * stride + k[None, :]
    at_b = tl.minimum(n, columns - 1)[None, :] * stride + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, depth, TILE):
        inside = k < depth - done
        left = tl.load(a + at_a, mask=inside[None, :], other=0.0)
        right = tl.load(b + at_b, mask=inside[:, None], other=0.0)
        scale = tl.load(a_scales + m * stride_a_row, mask=m < rows, other=0.0)
        if BLOCKS:
            total += tl.dot(left, right) * (scale * tl.load(b_scales))[:, None]
        else:  # one after the other: their product would take twice the registers
            scale_b = tl.load(b_scales + n * stride_b_row, mask=n < columns, other=0.0)
            total += tl.dot(left, right) * scale[:, None] * scale_b[None, :]
        a += TILE
        b += TILE
        a_scales += stride_a_tile
        b_scales += stride_b_tile
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out + m[:, None] * stride_out + n[None, :], total.to(out.dtype.element_ty), mask=inside)


def _bucket(rows: int) -> int:
    """The next power of two: tuning for each size of a ragged batch would take longer than it saves."""
    return max(64, triton.next_power_of_2(rows))


@triton.autotune(_CHOICE, key=["columns", "depth", "bucket", "BLOCKS"])
@triton.jit(do_not_specialize=["rows", "bucket", "stride_a_tile"])
def _multiply(
    a,
    b,
    a_scales,
    b_scales,
    out,
    rows,
    columns,
    depth,
    bucket,
    stride_a_row,
    stride_a_tile,
    stride_b_row,
    stride_b_tile,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    tall, wide = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    high, across = _place_of(tl.program_id(0), tall, wide, BAND)
    row, column = high.to(tl.int64) * BLOCK_M, across.to(tl.int64) * BLOCK_N
    _product(
        a + row * depth,
        b + column * depth,
        a_scales + row * stride_a_row,
        b_scales + (column // TILE if BLOCKS else column) * stride_b_row,
        out + row * columns + column,
        (rows - row).to(tl.int32),
        (columns - column).to(tl.int32),
        *(depth, depth),
        *(stride_a_row, stride_a_tile, stride_b_row, stride_b_tile, columns),
        *(BLOCK_M, BLOCK_N, BLOCKS),
    )


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a [M, K] in tiles times b [N, K] in blocks (Fprop, Dgrad) or tiles (Wgrad) -> [M, N] in `dtype`."""
    (rows, depth), columns = a.values.shape, b.values.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=a.values.device)
    if out.numel():
        _multiply[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]),)](
            *(a.values.contiguous(), b.values.contiguous(), a.scales, b.scales, out),
            *(rows, columns, depth, _bucket(rows), *a.scales.stride(), *b.scales.stride()),
            BLOCKS=b.scales.shape[0] != columns,
        )
    return out


@triton.autotune(_CHOICE, key=["columns", "depth", "experts", "bucket"])
@triton.jit(do_not_specialize=["bucket", "stride_a_tile"])
def _grouped(
    a,
    b,
    a_scales,
    b_scales,
    out,
    ends_E,
    columns,
    depth,
    experts,
    bucket,
    stride_a_row,
    stride_a_tile,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
):
    """There are enough programs for the worst spread of tokens; those without tokens end at once."""
    wide = tl.cdiv(columns, BLOCK_N)
    high, across = _place_of(tl.program_id(0), tl.num_programs(0) // wide, wide, BAND)
    expert, token, end = group_at(high, ends_E, experts, BLOCK_M, BLOCK_E)
    if expert < experts:
        row, column, of = token.to(tl.int64), across.to(tl.int64) * BLOCK_N, expert.to(tl.int64)
        deep = tl.cdiv(depth, TILE)
        _product(
            a + row * depth,
            b + (of * columns + column) * depth,
            a_scales + row * stride_a_row,
            b_scales + (of * tl.cdiv(columns, TILE) + column // TILE) * deep,
            out + row * columns + column,
            end - token,
            (columns - column).to(tl.int32),
            *(depth, depth),
            *(stride_a_row, stride_a_tile, deep, 1, columns),
            *(BLOCK_M, BLOCK_N, True),
        )


def grouped_multiply(a: Scaled, b: Scaled, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of expert e times its matrix: a [T, K] in tiles, b [E, N, K] in blocks -> [T, N] in `dtype`."""
    (tokens, depth), (experts, columns) = a.values.shape, b.values.shape[:2]
    out = torch.empty(tokens, columns, dtype=dtype, device=a.values.device)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        size = meta["BLOCK_M"]
        groups = (tokens + (size - 1) * min(experts, tokens)) // size
        return (groups * triton.cdiv(columns, meta["BLOCK_N"]),)

    if out.numel():
        _grouped[grid](
            *(a.values.contiguous(), b.values.contiguous(), a.scales, b.scales.contiguous(), out, ends_E),
            *(columns, depth, experts, _bucket(tokens), *a.scales.stride()),
            BLOCK_E=padded_experts(experts),
        )
    return out


@triton.autotune(_CHOICE, key=["rows", "columns", "experts", "bucket"])
@triton.jit(do_not_specialize=["bucket"])
def _outer(
    a,
    b,
    a_scales,
    b_scales,
    out,
    ends_E,
    rows,
    columns,
    places,
    experts,
    bucket,
    stride_a_row,
    stride_a_tile,
    stride_b_row,
    stride_b_tile,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
):
    """Part of one expert's matrix: the sum runs over the places of its tokens."""
    expert = tl.program_id(1)
    ids = tl.arange(0, BLOCK_E)
    _, _, groups = groups_of(ends_E, experts, TILE, BLOCK_E)
    group = tl.sum(tl.where(ids < expert, groups, 0), axis=0).to(tl.int64)
    depth = tl.sum(tl.where(ids == expert, groups, 0), axis=0) * TILE
    tall, wide = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    high, across = _place_of(tl.program_id(0), tall, wide, BAND)
    row, column = high.to(tl.int64) * BLOCK_M, across.to(tl.int64) * BLOCK_N
    _product(
        a + row * places + group * TILE,
        b + column * places + group * TILE,
        a_scales + row * stride_a_row + group * stride_a_tile,
        b_scales + column * stride_b_row + group * stride_b_tile,
        out + (expert.to(tl.int64) * rows + row) * columns + column,
        (rows - row).to(tl.int32),
        (columns - column).to(tl.int32),
        *(depth, places),
        *(stride_a_row, stride_a_tile, stride_b_row, stride_b_tile, columns),
        *(BLOCK_M, BLOCK_N, False),
    )


def grouped_outer(a: Scaled, b: Scaled, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Wgrad: a [M, P] and b [N, P] from `quantise_tokens` -> [E, M, N], zero for experts without tokens."""
    (rows, places), columns, experts = a.values.shape, b.values.shape[0], len(ends_E)
    out = torch.empty(experts, rows, columns, dtype=dtype, device=a.values.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]), experts

    if out.numel():
        _outer[grid](
            *(a.values.contiguous(), b.values.contiguous(), a.scales, b.scales, out, ends_E),
            *(rows, columns, places, experts, _bucket(places), *a.scales.stride(), *b.scales.stride()),
            BLOCK_E=padded_experts(experts),
        )
    return out
