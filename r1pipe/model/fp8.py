"""Weights in FP8 as DeepSeek-V3 publishes them: E4M3, a float32 scale per 128 x 128 block (V3 section 3.3).

w = w8 * scale_inv, block by block; blocks at the right and lower edge may be smaller ("ragged").
Axes: R rows, C columns, r and c blocks of rows and columns.
"""

import torch
from torch import Tensor

from r1pipe.model.kernels import reference
from r1pipe.model.kernels.reference import Scaled, tiles

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [reference.TILE, reference.TILE],
}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks a weight has in each direction."""
    return tuple(map(tiles, shape))


def dequantise(weight_RC: Tensor, scale_rc: Tensor) -> Tensor:
    """-> [R, C] bfloat16, rounded once from the float32 product."""
    return reference.dequantise(Scaled(weight_RC, scale_rc), torch.bfloat16)


def quantise(weight_RC: Tensor) -> Scaled:
    """-> [R, C] float8_e4m3fn and scale_rc float32: the largest magnitude of each block becomes 448."""
    return reference.quantise_blocks(weight_RC)
