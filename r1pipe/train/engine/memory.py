"""What a rank lets go of at ZeRO level 3, so that its memory falls as their number grows."""

import ctypes
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
RETURNED = 2**20  # bytes from which a block of memory goes back to the system when it is freed
TRIMMED = 2**23  # free bytes at the end of the heap that are kept


def return_freed_memory() -> None:
    """Give memory back to the system as it is freed: glibc keeps blocks of up to 32 MiB for later ones, which
    they seldom fit, so that gathered weights left holes of half a rank's memory on a CPU. Called wherever
    ranks read shards: at ZeRO level 3 and in a pipeline. Without glibc nothing changes."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, RETURNED)
        set_option(M_TRIM_THRESHOLD, TRIMMED)


def elements(tensor: Tensor) -> int:
    """How many a parameter has that ZeRO-3 has emptied."""
    return getattr(tensor, "ds_numel", tensor.numel())


def share_of(model: nn.Module, ranks: int) -> int:
    """The elements that each rank has of a model's weights, shared out or to be."""
    return -(-sum(map(elements, model.parameters())) // ranks)


@dataclass
class _Part:
    """A partitioned parameter, or a view of it, by its place in the whole."""

    parameter: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements


def keeping_no_weights() -> AbstractContextManager[Any]:
    """A block of forward passes that keep no partitioned weights for the backward pass, which takes them from
    the parameters again, as ZeRO-3's hooks gather them.

    Torch's products keep a view of their weight, and its memory with it: from its forward pass to the
    backward pass each rank would hold the whole model. (DeepSpeed replaces F.linear for this, and only within
    its zero.Init; here products of every kind remain what they are, to the last bit.)
    """
    return saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Tensor | _Part:
    parameter = tensor if hasattr(tensor, "ds_id") else tensor._base
    if parameter is None or not hasattr(parameter, "ds_id"):
        return tensor
    offset = int(tensor.storage_offset() - parameter.storage_offset())
    return _Part(parameter, tensor.size(), tensor.stride(), offset)


def _unpack(kept: Tensor | _Part) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    whole = kept.parameter.data
    return whole.as_strided(kept.size, kept.stride, int(whole.storage_offset()) + kept.offset)
