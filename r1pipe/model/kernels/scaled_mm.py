"""The Triton backend with cuBLAS for the products that are not grouped: torch.nn.functional.scaled_mm.

Scales of 1 x 128 and 128 x 128 need Hopper and CUDA 12.9. How they must lie is checked by torch
(aten/src/ATen/native/cuda/ScaledBlas.cpp, pull requests 158037, 164141, 166752): rows of tiles together,
[R, c] with strides (1, R); blocks along the summed axis together and filled up to four, [K / 128, N / 128]
with strides (1, K / 128). Strides in bytes must divide by 16, so M is filled up to four too, and N and K must
divide by 16: what does not goes to Triton, as do the products by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from r1pipe.model.kernels import triton_fp8
from r1pipe.model.kernels.reference import FP8, Scaled, tiles

ALIGNED = 16  # values; scales are four times as large
TOGETHER = 4  # scales


def __getattr__(name: str) -> Any:
    """All else is Triton's."""
    return getattr(triton_fp8, name)


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a [M, K] in tiles times b [N, K] in blocks (Fprop, Dgrad) or tiles (Wgrad) -> [M, N] in `dtype`."""
    (rows, depth), columns = a.values.shape, b.values.shape[0]
    if depth % ALIGNED or columns % ALIGNED or not rows:
        return triton_fp8.multiply(a, b, dtype)
    blocks = b.scales.shape[0] != columns
    out = F.scaled_mm(
        filled(a.values),
        b.values.contiguous().T,
        rows_together(a.scales),
        ScalingType.BlockWise1x128,
        blocks_together(b.scales, depth) if blocks else rows_together(b.scales),
        ScalingType.BlockWise128x128 if blocks else ScalingType.BlockWise1x128,
        output_dtype=dtype,
    )
    return out[:rows]


def filled(values: Tensor) -> Tensor:
    """Values [R, C] with rows of zeros up to the next multiple of four."""
    extra = -values.shape[0] % TOGETHER
    if not extra:
        return values.contiguous()
    return F.pad(values.view(torch.uint8), (0, 0, 0, extra)).view(FP8)


def rows_together(scales: Tensor) -> Tensor:
    """Scales of tiles [R, c] as [R', c] with strides (1, R'), R' a multiple of four; Triton's lie so."""
    rows, many = scales.shape
    whole = rows + -rows % TOGETHER
    if scales.stride() == (1, whole) and whole == rows:
        return scales
    placed = scales.new_zeros(many, whole).T
    placed[:rows] = scales
    return placed


def blocks_together(scales: Tensor, depth: int) -> Tensor:
    """Scales of blocks [n, k] as [k', n] with strides (1, k'), k' a multiple of four."""
    many = tiles(depth)
    placed = scales.new_zeros(scales.shape[0], many + -many % TOGETHER)
    placed[:, :many] = scales
    return placed.T
