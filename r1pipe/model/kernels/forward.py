"""What kernels/cpu/forward.cpp is called with: ctypes' view of its structs, and weights in its order.

Axes as in r1pipe/model/layers.py.
"""

import ctypes
import math
from ctypes import Structure, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from r1pipe.model.kernels.build import call
from r1pipe.model.kernels.checks import expect_even, expect_numbers

PANEL = 64  # as in gemm.h


def _fields(words: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in words.split()]


class Shape(Structure):
    """Numbers of the model."""

    _fields_ = [
        *_fields("layers width heads nope rope value latent query_rank vocabulary", c_int64),
        *_fields("dense_layers dense_inner experts top_k groups open_groups inner shared_inner", c_int64),
        *_fields("group_best sigmoid normalise", c_int64),
        *_fields("eps latent_eps scale routed_scale", c_double),
    ]


class Layer(Structure):
    """Pointers to one layer's weights; those that it has not are null."""

    _fields_ = [
        *_fields("attention_norm query_norm latent_norm mlp_norm gate bias", c_void_p),
        *_fields("first query up_key up_value out gate_up down shared_gate_up shared_down", c_void_p),
    ]


class Ends(Structure):
    """Pointers to the embedding as it is, the last norm and the packed head."""

    _fields_ = _fields("embedding norm head", c_void_p)


class Batch(Structure):
    """N new tokens, each of a slot and a position, and where their cache entries, logits and,
    where they are asked for, chosen experts go."""

    _fields_ = [
        *_fields("tokens wanted", c_int64),
        *_fields("token slot position want cache", c_void_p),
        *_fields("layer_stride slot_stride entry_stride", c_int64),
        *_fields("rotation logits experts", c_void_p),
    ]


def pack(weight: Tensor) -> Tensor:
    """A weight [..., outputs, depth] as gemm.h's Packed: [..., outputs / 64 rounded up, depth, 64].

    In bfloat16, where `depth` must be even, neighbours of the depth lie together: [..., depth / 2, 64, 2].
    """
    expect_numbers("weight", weight, dims=max(2, weight.ndim))
    *stack, outputs, depth = weight.shape
    pairs, panels = weight.dtype == torch.bfloat16, -(-outputs // PANEL)
    expect_even(weight.dtype, depth=depth)
    shape = (*stack, panels, depth // 2, PANEL, 2) if pairs else (*stack, panels, depth, PANEL)
    packed = weight.new_empty(shape)
    call("pack", pairs, weight.contiguous(), math.prod(stack), outputs, depth, packed)
    return packed


def run(dtype: torch.dtype, shape: Shape, layers: ctypes.Array, ends: Ends, batch: Batch) -> None:
    """Compute the batch's cache entries and logits. The caller has checked what the pointers point to."""
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    call(f"forward_{name}", ctypes.byref(shape), layers, ctypes.byref(ends), ctypes.byref(batch))
