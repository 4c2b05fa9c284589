"""The Triton backend: all that r1pipe/model/kernels/reference.py has, for GPUs with E4M3 (Hopper and newer).

Nothing in it waits for the device, so its calls can be captured in a CUDA graph, once each product's fastest
configuration has been looked for: that happens at the first call with a new N, K or power of two above M.
"""

from r1pipe.model.kernels.reference import Scaled, dequantise, place_groups, places_for, tiles, transposed
from r1pipe.model.kernels.triton_products import grouped_multiply, grouped_outer, multiply
from r1pipe.model.kernels.triton_quantise import (
    quantise_blocks,
    quantise_both,
    quantise_tiles,
    quantise_tokens,
    requantise_tokens,
)
from r1pipe.model.kernels.triton_swiglu import swiglu_backward, swiglu_quantise

__all__ = [
    "Scaled",
    "dequantise",
    "grouped_multiply",
    "grouped_outer",
    "multiply",
    "place_groups",
    "places_for",
    "quantise_blocks",
    "quantise_both",
    "quantise_tiles",
    "quantise_tokens",
    "requantise_tokens",
    "swiglu_backward",
    "swiglu_quantise",
    "tiles",
    "transposed",
]
