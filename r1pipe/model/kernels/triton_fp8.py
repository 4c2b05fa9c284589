"""The Triton backend: the functions of r1pipe/model/kernels/reference.py for GPUs with E4M3.

This file has SwiGLU into FP8 and its backward pass (V3, section 3.3.1), and exports all other functions.
Nothing waits for the device, so that CUDA graphs can capture the calls, once each product is tuned: that
happens at the first call with a new N, K or power of two above M.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1pipe.model.kernels.reference import TILE as WIDTH
from r1pipe.model.kernels.reference import Scaled, tiles
from r1pipe.model.kernels.triton_parts import TILE, count, magnitudes, scaled_by, scales_of
from r1pipe.model.kernels.triton_products import grouped_multiply, grouped_outer, multiply
from r1pipe.model.kernels.triton_quantise import (
    ROWS,
    WARPS,
    empty_tiles,
    quantise_blocks,
    quantise_both,
    quantise_tiles,
    quantise_tokens,
    requantise_tokens,
    rows_of,
)

__all__ = [
    "grouped_multiply",
    "grouped_outer",
    "multiply",
    "quantise_blocks",
    "quantise_both",
    "quantise_tiles",
    "quantise_tokens",
    "requantise_tokens",
    "swiglu_backward",
    "swiglu_quantise",
]

BACKWARD_ROWS = 8  # few, because a program that sums over a token's row processes all of it


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    gate_up,
    weights_T,
    values,
    scales,
    counts,
    tokens,
    inner,
    stride_x,
    ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    COUNT: tl.constexpr,
):
    across = tl.cdiv(inner, TILE)
    high, wide = tl.program_id(0) // across, tl.program_id(0) % across
    token, column = high * ROWS + tl.arange(0, ROWS), wide * TILE + tl.arange(0, TILE)
    inside = (token < tokens)[:, None] & (column < inner)[None, :]
    row = token.to(tl.int64)
    there = gate_up + row[:, None] * stride_x + column[None, :]
    gate = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(there + inner, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        out *= tl.load(weights_T + token, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
    scale = scales_of(tl.max(magnitudes(out), axis=1), POWER_OF_TWO)
    scaled = scaled_by(out, scale[:, None], POWER_OF_TWO)
    tl.store(values + row[:, None] * inner + column[None, :], scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scales + wide.to(tl.int64) * tokens + row, scale, mask=token < tokens)
    if COUNT:
        count(counts, out, scaled)


def swiglu_quantise(
    gate_up: Tensor, weights_T: Tensor | None, power_of_two: bool = False, counts: Tensor | None = None
) -> Scaled:
    """gate_up [T, 2I] -> silu(gate) * up * weight in tiles: values [T, I], scales [T, i]."""
    rows = rows_of(gate_up)
    tokens, inner = len(rows), rows.shape[1] // 2
    out = empty_tiles(tokens, inner, rows.device)
    if out.values.numel():
        grid = (triton.cdiv(tokens, ROWS) * tiles(inner),)
        _forward[grid](
            *(rows, _contiguous(weights_T), *out, counts, tokens, inner, rows.stride(0)),
            ROWS=ROWS,
            WEIGHTED=weights_T is not None,
            POWER_OF_TWO=power_of_two,
            COUNT=counts is not None,
            num_warps=WARPS,
        )
    return out


def _contiguous(weights_T: Tensor | None) -> Tensor | None:
    return None if weights_T is None else weights_T.contiguous()


@triton.jit
def _dequantised(values, scales, first, row, real, inside, stride_r, stride_c, WHOLE: tl.constexpr):
    """[ROWS, 128] numbers from column `first` on; if all are in one tile (WHOLE), its scale is read once."""
    column = first + tl.arange(0, TILE)
    codes = tl.load(values + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if WHOLE:
        scale = tl.load(scales + row * stride_r + first // TILE * stride_c, mask=real, other=0.0)[:, None]
    else:
        there = scales + row[:, None] * stride_r + (column // TILE)[None, :] * stride_c
        scale = tl.load(there, mask=inside, other=0.0)
    return codes * scale


@triton.jit(do_not_specialize=["tokens", "stride_c"])
def _backward(
    values,
    scales,
    weights_T,
    d_inner,
    out,
    d_gate_up,
    d_weights_T,
    tokens,
    inner,
    stride_r,
    stride_c,
    stride_d,
    ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`ROWS` tokens; with weights, all their columns in sequence, so that the sum is deterministic."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real, row = token < tokens, token.to(tl.int64)
    d_weight = tl.zeros([ROWS, TILE], tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_T + token, mask=real, other=0.0).to(tl.float32)[:, None]
    for start in range(tl.program_id(1) * TILE, inner, tl.num_programs(1) * TILE):
        column = start + tl.arange(0, TILE)
        inside = real[:, None] & (column < inner)[None, :]
        here = values + row[:, None] * (2 * inner)
        gate = _dequantised(here, scales, start, row, real, inside, stride_r, stride_c, WHOLE)
        up = _dequantised(here, scales, inner + start, row, real, inside, stride_r, stride_c, WHOLE)
        d = tl.load(d_inner + row[:, None] * stride_d + column[None, :], mask=inside, other=0.0)
        d = d.to(tl.float32)
        chance = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * chance
        product = silu * up
        if WEIGHTED:
            d_weight += d * product
            product *= weight
            d *= weight
        d_gate = d * up * (chance + silu * (1.0 - chance))
        kind = out.dtype.element_ty
        tl.store(out + row[:, None] * inner + column[None, :], product.to(kind), mask=inside)
        there = d_gate_up + row[:, None] * (2 * inner) + column[None, :]
        tl.store(there, d_gate.to(kind), mask=inside)
        tl.store(there + inner, (d * silu).to(kind), mask=inside)
    if WEIGHTED:
        tl.store(d_weights_T + token, tl.sum(d_weight, axis=1), mask=real)


def swiglu_backward(
    gate_up: Scaled, weights_T: Tensor | None, d_inner_TI: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(SwiGLU's output [T, I], d_gate_up [T, 2I], d_weights_T or None); as the reference."""
    values, d_inner = gate_up.values.contiguous(), rows_of(d_inner_TI)
    tokens, inner = d_inner.shape
    out, d_gate_up = d_inner.new_empty(tokens, inner), d_inner.new_empty(tokens, 2 * inner)
    d_weights_T = None if weights_T is None else torch.zeros(tokens, device=d_inner.device)
    if out.numel():
        grid = (triton.cdiv(tokens, BACKWARD_ROWS), tiles(inner) if weights_T is None else 1)
        inputs = values, gate_up.scales, _contiguous(weights_T), d_inner
        strides = *gate_up.scales.stride(), d_inner.stride(0)
        _backward[grid](
            *(*inputs, out, d_gate_up, d_weights_T, tokens, inner, *strides),
            ROWS=BACKWARD_ROWS,
            WEIGHTED=weights_T is not None,
            WHOLE=inner % WIDTH == 0,
        )
    return out, d_gate_up, d_weights_T
