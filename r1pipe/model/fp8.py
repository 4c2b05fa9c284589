"""Weights in FP8 as DeepSeek-V3 publishes them: E4M3, a float32 scale per 128 x 128 block (V3 section 3.3).

w = w8 * scale_inv, block by block; blocks at the right and lower edge may be smaller ("ragged").
Axes: R rows, C columns, r and c blocks of rows and columns.
"""

import torch
from torch import Tensor

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks a weight has in each direction."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantise(weight_RC: Tensor, scale_rc: Tensor) -> Tensor:
    """-> [R, C] bfloat16, rounded once from the float32 product."""
    return (weight_RC.float() * _spread(scale_rc, weight_RC.shape)).bfloat16()


def quantise(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """-> [R, C] float8_e4m3fn and scale_rc float32: the largest magnitude of each block becomes 448.

    A block of zeros gets scale 1.
    """
    rows, columns = weight_RC.shape
    blocks = scale_shape((rows, columns))
    padded = torch.zeros(blocks[0] * BLOCK, blocks[1] * BLOCK)
    padded[:rows, :columns] = weight_RC
    largest_rc = padded.abs().view(blocks[0], BLOCK, blocks[1], BLOCK).amax(dim=(1, 3))
    scale_rc = torch.where(largest_rc > 0, largest_rc / LARGEST, 1.0)
    scaled_RC = weight_RC.float() / _spread(scale_rc, weight_RC.shape)
    return scaled_RC.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale_rc


def _spread(scale_rc: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Each block's scale at each of its elements, [R, C]."""
    return scale_rc.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
