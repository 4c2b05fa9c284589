"""The Triton backend with DeepGEMM for the products whose shapes it supports (deepseek-ai/DeepGEMM, Hopper).

    pip install sgl-deep-gemm

That package, imported as deep_gemm, is maintained and has upstream's functions. On Hopper
(csrc/apis/gemm.hpp and layout.hpp) a [M, K] in tiles times b [N, K] in blocks gives bfloat16, and times b in
tiles is added to a float32 matrix that the caller provides. Scales are float32; those of tiles are copied
unless rows are contiguous and strides in bytes are multiples of 16. In grouped products each expert's rows
fill whole groups of 128. Only shapes that its tests cover are used: K in whole tiles and N in steps of 64.

Triton does the rest: other shapes and types, and grouped Wgrad, for which DeepGEMM needs the sizes on the
host (`ks`), so that every layer would wait for the device.
"""

from typing import Any

import deep_gemm
import torch
from torch import Tensor

from r1pipe.model.kernels import triton_fp8
from r1pipe.model.kernels.reference import FP8, TILE, Scaled, place_tokens, places_for

COLUMNS = 64
TILES_BY_TILES = (1, 1, TILE)  # numbers that share a scale: rows of a, rows of b, along the summed axis
NO_EXPERT = -1  # of a place without a token


def __getattr__(name: str) -> Any:
    """Everything else is Triton's."""
    return getattr(triton_fp8, name)


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    (rows, depth), columns = a.values.shape, b.values.shape[0]
    blocks = b.scales.shape[0] != columns
    if not rows or not takes(depth, columns) or dtype != (torch.bfloat16 if blocks else torch.float32):
        return triton_fp8.multiply(a, b, dtype)
    left, right = (a.values.contiguous(), a.scales), (b.values.contiguous(), b.scales)
    if blocks:
        out = torch.empty(rows, columns, dtype=dtype, device=a.values.device)
        deep_gemm.fp8_gemm_nt(left, right, out)
    else:
        out = torch.zeros(rows, columns, dtype=dtype, device=a.values.device)
        deep_gemm.fp8_gemm_nt(left, right, out, c=out, recipe=TILES_BY_TILES)
    return out


def grouped_multiply(a: Scaled, b: Scaled, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    (tokens, depth), columns = a.values.shape, b.values.shape[1]
    if not tokens or not takes(depth, columns) or dtype != torch.bfloat16:
        return triton_fp8.grouped_multiply(a, b, ends_E, dtype)
    places_T, experts_P = places(tokens, ends_E)
    placed = place(a, places_T, len(experts_P))
    out = torch.empty(len(experts_P), columns, dtype=dtype, device=a.values.device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        tuple(placed), (b.values.contiguous(), b.scales.contiguous()), out, experts_P
    )
    return out.index_select(0, places_T)


def takes(depth: int, columns: int) -> bool:
    """Whether K and N are among the shapes that DeepGEMM is tested with."""
    return depth > 0 and depth % TILE == 0 and columns > 0 and columns % COLUMNS == 0


def places(tokens: int, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """(each token's place, [T]; each place's expert or NO_EXPERT, [P] int32), whole tiles for each expert."""
    places_T, experts_T = place_tokens(tokens, ends_E)
    experts_P = ends_E.new_full((places_for(tokens, len(ends_E)),), NO_EXPERT, dtype=torch.int32)
    return places_T, experts_P.index_copy_(0, places_T, experts_T.int())


def place(a: Scaled, places_T: Tensor, many: int) -> Scaled:
    """a [T, K] at its places, [P, K], and zeros elsewhere; the rows of scales are contiguous."""
    values = a.values.new_zeros(many, a.values.shape[1], dtype=torch.uint8)
    values.index_copy_(0, places_T, a.values.view(torch.uint8))
    scales = a.scales.new_zeros(a.scales.shape[1], many).T
    return Scaled(values.view(FP8), scales.index_copy_(0, places_T, a.scales))
