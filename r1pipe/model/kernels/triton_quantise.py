"""Quantising in one pass over the input, in Triton; r1pipe/model/kernels/reference.py defines the results.

Scales of tiles [R, c] are stored as [c, R], because a product reads one tile's scales of many rows at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1pipe.model.kernels.reference import FP8, Scaled, places_for, tiles
from r1pipe.model.kernels.reference import TILE as WIDTH
from r1pipe.model.kernels.triton_parts import (
    TILE,
    count,
    group_at,
    magnitudes,
    padded_experts,
    scaled_by,
    scales_of,
)

ROWS = 32  # rows of a program that quantises tiles; for blocks it has a whole one
# At most 32 numbers a thread: with 64, registers limit the threads to too few to keep the memory busy.
WARPS, BLOCK_WARPS = 8, 16


@triton.jit(do_not_specialize=["rows", "stride_c"])  # ragged, and nothing depends on it
def _quantise(
    x_ptr,
    values,
    scales,
    counts,
    rows,
    columns,
    stride_x,
    stride_r,
    stride_c,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One tile of each of `ROWS` rows, or one block, of a matrix of a batch: x [B, R, C]."""
    across = tl.cdiv(columns, TILE)
    high, wide = tl.program_id(0) // across, tl.program_id(0) % across
    batch = tl.program_id(1).to(tl.int64)
    row, column = high * ROWS + tl.arange(0, ROWS), wide * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    of_batch = batch * rows + row  # int64: matrices have more than 2^31 numbers
    x = tl.load(x_ptr + of_batch[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    amax = tl.max(magnitudes(x), axis=1)
    if BLOCKS:
        scale = scales_of(tl.max(amax, axis=0), POWER_OF_TWO)
        scaled = scaled_by(x, scale, POWER_OF_TWO)
        tl.store(scales + batch * tl.cdiv(rows, ROWS) * across + high * across + wide, scale)
    else:
        scale = scales_of(amax, POWER_OF_TWO)
        scaled = scaled_by(x, scale[:, None], POWER_OF_TWO)
        tl.store(scales + of_batch * stride_r + wide.to(tl.int64) * stride_c, scale, mask=row < rows)
    tl.store(values + of_batch[:, None] * columns + column[None, :], scaled.to(tl.float8e4nv), mask=inside)
    if COUNT:
        count(counts, x, scaled)


def rows_of(x: Tensor) -> Tensor:
    """x [..., R, C] as [R', C] with contiguous rows."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or 0 in rows.shape else rows.contiguous()


def empty_tiles(rows: int, columns: int, device: torch.device) -> Scaled:
    """Uninitialised [R, C] in tiles."""
    values = torch.empty(rows, columns, dtype=FP8, device=device)
    return Scaled(values, torch.empty(tiles(columns), rows, device=device).T)


def quantise_tiles(x: Tensor, power_of_two: bool = False, counts: Tensor | None = None) -> Scaled:
    """x [..., R, C] -> values [..., R, C], scales [..., R, c]."""
    flat = rows_of(x)
    values, scales = empty_tiles(len(flat), x.shape[-1], x.device)
    if flat.numel():
        grid = (triton.cdiv(len(flat), ROWS) * tiles(x.shape[-1]), 1)
        strides = flat.stride(0), *scales.stride()
        switches = {"BLOCKS": False, "POWER_OF_TWO": power_of_two, "COUNT": counts is not None}
        _quantise[grid](
            flat, values, scales, counts, *flat.shape, *strides, ROWS=ROWS, num_warps=WARPS, **switches
        )
    return Scaled(values.view(x.shape), scales.unflatten(0, x.shape[:-1]))


def quantise_blocks(x: Tensor, power_of_two: bool = False, counts: Tensor | None = None) -> Scaled:
    """x [..., R, C] -> values [..., R, C], scales [..., r, c]."""
    *batch, rows, columns = x.shape
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty(*batch, tiles(rows), tiles(columns), device=x.device)
    if x.numel():
        flat = rows_of(x)
        grid = (tiles(rows) * tiles(columns), len(flat) // rows)
        sizes = rows, columns, flat.stride(0), 0, 0
        switches = {"BLOCKS": True, "POWER_OF_TWO": power_of_two, "COUNT": counts is not None}
        _quantise[grid](flat, values, scales, counts, *sizes, ROWS=WIDTH, num_warps=BLOCK_WARPS, **switches)
    return Scaled(values, scales)


@triton.jit(do_not_specialize=["tokens", "scale_c"])
def _place(
    x_ptr,
    x_scales,
    ends_E,
    values,
    scales,
    placed,
    placed_scales,
    counts,
    tokens,
    width,
    places,
    experts,
    stride_x,
    scale_r,
    scale_c,
    WIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BOTH: tl.constexpr,
    SCALED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    COUNT: tl.constexpr,
):
    """`WIDE` columns of one expert's 128 places: transposed in tiles, and with BOTH also as they are.

    With SCALED the input is FP8 in tiles.
    """
    across = tl.cdiv(width, WIDE)
    group, wide = tl.program_id(0) // across, tl.program_id(0) % across
    _, token, end = group_at(group, ends_E, experts, TILE, BLOCK_E)
    place, column = tl.arange(0, TILE), wide * WIDE + tl.arange(0, WIDE)
    row = (token + place).to(tl.int64)
    inside = (row < end)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        scale = x_scales + row * scale_r + (wide * WIDE // TILE).to(tl.int64) * scale_c
        x *= tl.load(scale, mask=row < end, other=0.0)[:, None]
    if BOTH:
        scale_T = scales_of(tl.max(magnitudes(x), axis=1), POWER_OF_TWO)
        scaled = scaled_by(x, scale_T[:, None], POWER_OF_TWO)
        tl.store(values + row[:, None] * width + column[None, :], scaled.to(tl.float8e4nv), mask=inside)
        tl.store(scales + wide.to(tl.int64) * tokens + row, scale_T, mask=row < end)
        if COUNT:
            count(counts, x, scaled)
    scale_C = scales_of(tl.max(magnitudes(x), axis=0), POWER_OF_TWO)
    scaled = scaled_by(x, scale_C[None, :], POWER_OF_TWO)
    there = column.to(tl.int64)[:, None] * places + group * TILE + place[None, :]
    tl.store(placed + there, tl.trans(scaled.to(tl.float8e4nv)), mask=(column < width)[:, None])
    tl.store(placed_scales + group.to(tl.int64) * width + column, scale_C, mask=column < width)
    if COUNT and not BOTH:
        count(counts, x, scaled)


def _placed(
    x: Tensor,
    x_scales: Tensor | None,
    ends_E: Tensor,
    as_they_are: Scaled | None,
    power_of_two: bool,
    counts: Tensor | None,
) -> Scaled:
    """x in tiles along tokens; fills `as_they_are`, if present, with x in tiles."""
    flat, experts = rows_of(x), len(ends_E)
    tokens, width = flat.shape
    places = places_for(tokens, experts)
    placed = empty_tiles(width, places, x.device)
    if flat.numel():
        wide = WIDTH if as_they_are else WIDTH // 2  # rows' tiles are whole
        grid = (tiles(places) * triton.cdiv(width, wide),)
        out = (*(as_they_are or (None, None)), *placed)
        sizes = tokens, width, places, experts, flat.stride(0)
        strides = (0, 0) if x_scales is None else x_scales.stride()
        _place[grid](
            *(flat, x_scales, ends_E, *out, counts, *sizes, *strides),
            WIDE=wide,
            BLOCK_E=padded_experts(experts),
            BOTH=as_they_are is not None,
            SCALED=x_scales is not None,
            POWER_OF_TWO=power_of_two,
            COUNT=counts is not None,
            num_warps=BLOCK_WARPS * wide // WIDTH,
        )
    return placed


def quantise_tokens(
    x: Tensor, ends_E: Tensor, power_of_two: bool = False, counts: Tensor | None = None
) -> Scaled:
    """x [T, C] in tiles along tokens, for Wgrad: values [C, P], scales [C, p]; as the reference."""
    return _placed(x, None, ends_E, None, power_of_two, counts)


def quantise_both(
    x: Tensor, ends_E: Tensor, power_of_two: bool = False, counts: Tensor | None = None
) -> tuple[Scaled, Scaled]:
    """`quantise_tiles` and `quantise_tokens` of x [T, C], which is read once."""
    as_they_are = empty_tiles(len(x), x.shape[1], x.device)
    return as_they_are, _placed(x, None, ends_E, as_they_are, power_of_two, counts)


def requantise_tokens(x: Scaled, ends_E: Tensor, power_of_two: bool = False) -> Scaled:
    """Tiles [T, C] in tiles along tokens, without a float32 copy in between."""
    return _placed(x.values, x.scales, ends_E, None, power_of_two, None)
