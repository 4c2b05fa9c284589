"""The arguments of kernels/cpu/forward.cpp: its structs in ctypes, and packed weights.

Axes as in r1pipe/model/layers.py.
"""

import ctypes
import math
from ctypes import Structure, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from r1pipe.model.kernels.build import call
from r1pipe.model.kernels.checks import check_even, check_floats

PANEL = 64  # as in gemm.h


def _fields(words: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in words.split()]


class Shape(Structure):
    """The model's sizes and constants."""

    _fields_ = [
        *_fields("layers width heads nope rope value latent query_rank vocabulary", c_int64),
        *_fields("dense_layers dense_inner experts top_k groups open_groups inner shared_inner", c_int64),
        *_fields("group_best sigmoid normalise", c_int64),
        *_fields("eps latent_eps scale routed_scale", c_double),
    ]


class Layer(Structure):
    """Pointers to one layer's weights; null for those that it lacks."""

    _fields_ = [
        *_fields("attention_norm query_norm latent_norm mlp_norm gate bias", c_void_p),
        *_fields("first query up_key up_value out gate_up down shared_gate_up shared_down", c_void_p),
    ]


class Ends(Structure):
    """Pointers to the unpacked embedding, the last norm and the packed head."""

    _fields_ = _fields("embedding norm head", c_void_p)


class Batch(Structure):
    """N new tokens with their slots and positions, and pointers to the outputs: cache entries, logits and
    (or null) chosen experts."""

    _fields_ = [
        *_fields("tokens wanted", c_int64),
        *_fields("token slot position want cache", c_void_p),
        *_fields("layer_stride slot_stride entry_stride", c_int64),
        *_fields("rotation logits experts", c_void_p),
    ]


def pack(weight: Tensor) -> Tensor:
    """A weight [..., outputs, depth] as gemm.h's Packed: [..., outputs / 64 rounded up, depth, 64].

    In bfloat16, where `depth` must be even, pairs along the depth are adjacent: [..., depth / 2, 64, 2].
    """
    check_floats("weight", weight, dims=max(2, weight.ndim))
    *stack, outputs, depth = weight.shape
    pairs, panels = weight.dtype == torch.bfloat16, -(-outputs // PANEL)
    check_even(weight.dtype, depth=depth)
    shape = (*stack, panels, depth // 2, PANEL, 2) if pairs else (*stack, panels, depth, PANEL)
    packed = weight.new_empty(shape)
    call("pack", pairs, weight.contiguous(), math.prod(stack), outputs, depth, packed)
    return packed


def run(dtype: torch.dtype, shape: Shape, layers: ctypes.Array, ends: Ends, batch: Batch) -> None:
    """Compute the batch's cache entries and logits. The caller must have checked all pointers."""
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    call(f"forward_{name}", ctypes.byref(shape), layers, ctypes.byref(ends), ctypes.byref(batch))
