"""The Triton backend with cuBLAS (torch.nn.functional.scaled_mm) for the products that are not grouped.

Scales of 1 x 128 and 128 x 128 need Hopper and CUDA 12.9. Torch checks their layout
(aten/src/ATen/native/cuda/ScaledBlas.cpp, pull requests 158037, 164141, 166752): scales of tiles [R, c] with
strides (1, R); scales of blocks [K / 128, N / 128] with strides (1, K / 128), padded to four along K. Strides
in bytes must be multiples of 16, so M is padded to four too; if N or K is no multiple of 16, Triton does the
product, as it does the grouped ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from r1pipe.model.kernels import triton_fp8
from r1pipe.model.kernels.reference import FP8, Scaled, tiles

ALIGNED = 16  # values; scales have four times as many bytes
ALIGNED_SCALES = 4


def __getattr__(name: str) -> Any:
    """Everything else is Triton's."""
    return getattr(triton_fp8, name)


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    (rows, depth), columns = a.values.shape, b.values.shape[0]
    if depth % ALIGNED or columns % ALIGNED or not rows:
        return triton_fp8.multiply(a, b, dtype)
    blocks = b.scales.shape[0] != columns
    out = F.scaled_mm(
        padded(a.values),
        b.values.contiguous().T,
        rows_together(a.scales),
        ScalingType.BlockWise1x128,
        blocks_together(b.scales, depth) if blocks else rows_together(b.scales),
        ScalingType.BlockWise128x128 if blocks else ScalingType.BlockWise1x128,
        output_dtype=dtype,
    )
    return out[:rows]


def padded(values: Tensor) -> Tensor:
    """Values [R, C], padded with rows of zeros to a multiple of four."""
    extra = -values.shape[0] % ALIGNED_SCALES
    if not extra:
        return values.contiguous()
    return F.pad(values.view(torch.uint8), (0, 0, 0, extra)).view(FP8)


def rows_together(scales: Tensor) -> Tensor:
    """Scales of tiles [R, c] as [R', c] with strides (1, R'), R' a multiple of four; Triton's have these."""
    rows, many = scales.shape
    whole = rows + -rows % ALIGNED_SCALES
    if scales.stride() == (1, whole) and whole == rows:
        return scales
    placed = scales.new_zeros(many, whole).T
    placed[:rows] = scales
    return placed


def blocks_together(scales: Tensor, depth: int) -> Tensor:
    """Scales of blocks [n, k] as [k', n] with strides (1, k'), k' a multiple of four."""
    many = tiles(depth)
    placed = scales.new_zeros(scales.shape[0], many + -many % ALIGNED_SCALES)
    placed[:, :many] = scales
    return placed.T
