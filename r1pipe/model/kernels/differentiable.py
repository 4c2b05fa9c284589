"""What the compiled CPU kernels share: how one is called for its type, and how it becomes differentiable."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1pipe.model.kernels.build import call
from r1pipe.model.kernels.halves import Halves, in_halves


def call_for(name: str, of: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel for the type of `of`."""
    call(name, of.dtype == torch.bfloat16, *arguments)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as rows [N, D], each contiguous; a view where possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


class Differentiable(torch.autograd.Function):
    """`run(*inputs)` -> the result and what is kept; `gradients(d_result, *kept)` -> those of the inputs in
    two halves (see halves.py).

    Both must use no tensor of the inputs but their arguments, or it outlives the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], gradients: Callable[..., Any], *inputs: Any) -> Tensor:
        result, *kept = run(*inputs)
        ctx.gradients = gradients
        ctx.save_for_backward(*kept)
        return result

    @in_halves
    def backward(ctx: Any, d_result: Tensor) -> Halves:
        found, of_weights = ctx.gradients(d_result, *ctx.saved_tensors)
        return (None, None, *found), of_weights


def no_weights() -> tuple[()]:
    return ()
