"""Checks of the arguments of every C++ kernel, because a pointer to a wrong tensor crashes Python.

All raise ValueError, naming the argument.
"""

import torch
from torch import Tensor

ANY = -1  # any size


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """A non-empty tensor on the CPU with this type and shape."""
    fits = tensor.ndim == len(shape) and all(
        size > 0 and wanted in (ANY, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or tensor.device.type != "cpu":
        sizes = ", ".join("any" if size == ANY else str(size) for size in shape)
        raise ValueError(
            f"{name} must be {dtype} [{sizes}] on the CPU, not {tensor.dtype} {list(tensor.shape)}"
            f" on {tensor.device}"
        )


def check_floats(name: str, tensor: Tensor, dims: int | None = None) -> None:
    """A float32 or bfloat16 tensor of `dims` dimensions (None: at least one)."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} must be torch.float32 or torch.bfloat16, not {tensor.dtype}")
    check_tensor(name, tensor, tensor.dtype, *[ANY] * (max(1, tensor.ndim) if dims is None else dims))


def check_indices(name: str, tensor: Tensor, size: int, *shape: int) -> None:
    """An int64 tensor of this shape with values from 0 to `size` - 1."""
    check_tensor(name, tensor, torch.int64, *shape)
    lowest, highest = (int(end) for end in tensor.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} must be from 0 to {size - 1}, not from {lowest} to {highest}")


def check_even(dtype: torch.dtype, **sizes: int) -> None:
    """Even sizes in bfloat16, whose products take two neighbours at a time."""
    odd = [f"{name} is {size}" for name, size in sizes.items() if size % 2]
    if dtype == torch.bfloat16 and odd:
        raise ValueError(f"products in bfloat16 need even sizes, but {', '.join(odd)}")
