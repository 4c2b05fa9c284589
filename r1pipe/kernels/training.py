"""The compiled kernels of training passes on a CPU as differentiable functions, each the equal of torch code in model/.

Axes as in r1pipe/model/layers.py.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1pipe.kernels.build import library

CHUNK = 512  # tokens whose sums a thread holds in its cache


@cache
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on a CPU, of one type that it multiplies, of even widths."""
    first = tensors[0]
    if first.device.type != "cpu" or any(t.dtype != first.dtype or t.shape[-1] % 2 for t in tensors):
        return False
    if first.dtype != torch.float32 and not (first.dtype == torch.bfloat16 and _multiplies_bfloat16()):
        return False
    return library() is not None


def _call(name: str, of: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel for the type of `of`; None is a null pointer."""
    values: list[Any] = [ctypes.c_int64(of.dtype == torch.bfloat16)]
    for argument in arguments:
        if isinstance(argument, Tensor):
            values.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            values.append(ctypes.c_float(argument))
        else:
            values.append(ctypes.c_int64(argument or 0))
    getattr(library(), name)(*values)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_up_EiD: Tensor,
        down_EDI: Tensor,
        weights_NK: Tensor | None,
        experts_NK: Tensor | None,
    ) -> Tensor:
        x_ND, gate_up_EiD, down_EDI = x_ND.contiguous(), gate_up_EiD.contiguous(), down_EDI.contiguous()
        weights_NK = None if weights_NK is None else weights_NK.contiguous()
        experts_NK = None if experts_NK is None else experts_NK.contiguous()
        (tokens, width), (experts, _, inner) = x_ND.shape, down_EDI.shape
        top_k = 1 if experts_NK is None else experts_NK.shape[1]
        share = -(-tokens // torch.get_num_threads())
        chunk = min(CHUNK, -(-share // 64) * 64)
        ctx.sizes = (tokens, top_k, experts, width, inner, chunk)
        rows = tokens * top_k + experts * (-(-tokens // chunk)) * 15  # groups are filled up to 16
        kept = x_ND.new_empty(rows, 2 * inner)
        out_ND = torch.empty_like(x_ND)
        given = (x_ND, gate_up_EiD, down_EDI, weights_NK, experts_NK, kept)
        _call("experts_forward", x_ND, *ctx.sizes, *given, out_ND)
        ctx.save_for_backward(*given)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_ND: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        gradients = [None if t is None else torch.empty_like(t) for t in given[:4]]
        _call("experts_backward", given[0], *ctx.sizes, *given, d_out_ND.contiguous(), *gradients)
        return *gradients, None


def experts(
    x_ND: Tensor, gate_up_EiD: Tensor, down_EDI: Tensor, weights_NK: Tensor, experts_NK: Tensor
) -> Tensor:
    """Weighted sum of the chosen experts' SwiGLUs, [N, D]; gate_up [E, 2I, D], gate first, down [E, D, I]."""
    return _Experts.apply(x_ND, gate_up_EiD, down_EDI, weights_NK, experts_NK)


def swiglu(x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [..., D]."""
    gate_up = torch.cat([gate_ID, up_ID]).unsqueeze(0)
    return _Experts.apply(x.flatten(0, -2), gate_up, down_DI.unsqueeze(0), None, None).view_as(x)
