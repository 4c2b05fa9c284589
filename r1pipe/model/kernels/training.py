"""The compiled CPU kernels of training passes, differentiable; torch's operators in model/ compute the same.

Axes as in r1pipe/model/layers.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1pipe.model.kernels.build import call, runs_here
from r1pipe.model.kernels.checks import ANY, check_even, check_floats, check_indices, check_tensor

CHUNK = 512  # tokens whose sums fit a thread's cache
WORTHWHILE = 256  # rows
LOGITS = 2**21  # gradients of logits in memory at once


def usable(x: Tensor, *sizes: int) -> bool:
    """Whether to use the kernels for `x` [..., D], and weights of its type and of these sizes.

    Each call packs the weights, which a few rows without gradient are not worth. torch.compile cannot trace
    the kernels, and they do not take empty tensors.
    """
    if torch.compiler.is_compiling() or 0 in (*x.shape, *sizes):
        return False
    if x.device.type != "cpu" or not (torch.is_grad_enabled() or x.shape[:-1].numel() >= WORTHWHILE):
        return False
    if x.dtype == torch.bfloat16 and any(n % 2 for n in (x.shape[-1], *sizes)):
        return False  # products take two neighbours at a time
    return runs_here(x.dtype)


def _call(name: str, of: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel for the type of `of`."""
    call(name, of.dtype == torch.bfloat16, *arguments)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


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
        inputs = _contiguous(x_ND, gate_up_EiD, down_EDI, weights_NK, experts_NK)
        (tokens, width), (experts, _, inner) = x_ND.shape, down_EDI.shape
        top_k = 1 if experts_NK is None else experts_NK.shape[1]
        share = -(-tokens // torch.get_num_threads())
        chunk = min(CHUNK, -(-share // 64) * 64)
        ctx.sizes = (tokens, top_k, experts, width, inner, chunk)
        rows = tokens * top_k + experts * (-(-tokens // chunk)) * 15  # groups are padded to 16
        kept, out_ND = x_ND.new_empty(rows, 2 * inner), x_ND.new_empty(tokens, width)
        _call("experts_forward", x_ND, *ctx.sizes, *inputs, kept, out_ND)
        ctx.save_for_backward(*inputs, kept)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_ND: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [None if t is None else torch.empty_like(t) for t in saved[:4]]
        _call("experts_backward", saved[0], *ctx.sizes, *saved, d_out_ND.contiguous(), *gradients)
        return *gradients, None


def experts(
    x_ND: Tensor, gate_up_EiD: Tensor, down_EDI: Tensor, weights_NK: Tensor, experts_NK: Tensor
) -> Tensor:
    """Weighted sum of the chosen experts' SwiGLUs, [N, D]; gate_up [E, 2I, D], gate first, down [E, D, I]."""
    check_floats("x", x_ND, dims=2)
    tokens, width = x_ND.shape
    check_tensor("down", down_EDI, x_ND.dtype, ANY, width, ANY)
    experts, _, inner = down_EDI.shape
    check_tensor("gate_up", gate_up_EiD, x_ND.dtype, experts, 2 * inner, width)
    check_tensor("routing weights", weights_NK, torch.float32, tokens, ANY)
    check_indices("chosen experts", experts_NK, experts, *weights_NK.shape)
    check_even(x_ND.dtype, width=width, inner=inner)
    return _Experts.apply(x_ND, gate_up_EiD, down_EDI, weights_NK, experts_NK)


def swiglu(x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [..., D]."""
    check_floats("x", x)
    width = x.shape[-1]
    check_tensor("gate", gate_ID, x.dtype, ANY, width)
    inner = len(gate_ID)
    check_tensor("up", up_ID, x.dtype, inner, width)
    check_tensor("down", down_DI, x.dtype, width, inner)
    check_even(x.dtype, width=width, inner=inner)
    gate_up = torch.cat([gate_ID, up_ID]).unsqueeze(0)
    return _Experts.apply(_rows(x), gate_up, down_DI.unsqueeze(0), None, None).view_as(x)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BTHq: Tensor,
        key_value_BMHw: Tensor,
        key_rope_BMR: Tensor,
        rotation_BTr: Tensor,
        mask_BTM: Tensor | None,
        scale: float,
    ) -> Tensor:
        inputs = _contiguous(query_BTHq, key_value_BMHw, key_rope_BMR, rotation_BTr, mask_BTM)
        rows, tokens, heads, width = query_BTHq.shape
        keys, rope = key_rope_BMR.shape[1:]
        nope = width - rope
        value = key_value_BMHw.shape[-1] - nope
        stride = 0 if rotation_BTr.shape[0] == 1 else tokens * rope
        ctx.sizes = (rows, tokens, keys, heads, nope, rope, value, stride, scale)
        out_BTHv = query_BTHq.new_empty(rows, tokens, heads, value)
        logsums_BHT = torch.empty(rows, heads, tokens)
        _call("attention_forward", query_BTHq, *ctx.sizes, *inputs, out_BTHv, logsums_BHT)
        ctx.save_for_backward(*inputs, out_BTHv, logsums_BHT)
        return out_BTHv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BTHv: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in saved[:3]]
        _call("attention_backward", saved[0], *ctx.sizes, *saved, d_out_BTHv.contiguous(), *gradients)
        return *gradients, None, None, None


def attention(
    query_BTHq: Tensor,
    key_value_BMHw: Tensor,
    key_rope_BMR: Tensor,
    rotation_BTr: Tensor,
    mask_BTM: Tensor | None,
    scale: float,
) -> Tensor:
    """-> [B, T, H, v], causal, or as `mask_BTM` (true: may look).

    Queries (q = nope + R) are not yet rotated; keys are a head's own part, in `key_value_BMHw` before its
    values (w = nope + v), and the rotated part that all heads share.
    """
    check_floats("queries", query_BTHq, dims=4)
    rows, tokens, heads, width = query_BTHq.shape
    check_tensor("rotated keys", key_rope_BMR, query_BTHq.dtype, rows, ANY, ANY)
    keys, rope = key_rope_BMR.shape[1:]
    check_tensor("keys and values", key_value_BMHw, query_BTHq.dtype, rows, keys, heads, ANY)
    nope = width - rope
    value = key_value_BMHw.shape[-1] - nope
    if nope < 0 or value < 1:
        raise ValueError(f"no heads have queries of {width}, {rope} of it rotated, and values of {value}")
    check_even(query_BTHq.dtype, nope=nope, value=value)
    _check_rotation(rotation_BTr, rows, tokens, rope)
    if mask_BTM is not None:
        check_tensor("mask", mask_BTM, torch.bool, rows, tokens, keys)
    elif keys != tokens:
        raise ValueError(f"{tokens} tokens that attend to {keys} keys need a mask")
    return _Attention.apply(query_BTHq, key_value_BMHw, key_rope_BMR, rotation_BTr, mask_BTM, scale)


def _check_rotation(rotation_BTr: Tensor, rows: int, tokens: int, width: int) -> None:
    check_tensor("rotation", rotation_BTr, torch.complex64, ANY, tokens, width // 2)
    if width % 2 or len(rotation_BTr) not in (1, rows):
        raise ValueError(f"a rotation of {len(rotation_BTr)} rows does not fit {rows} rows of width {width}")


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as rows [N, D], each contiguous; a view where possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = _rows(x)
        factors_N = torch.empty(x_ND.shape[0])
        out = x.new_empty(x.shape)
        weight_D = weight_D.contiguous()
        _call("norm_forward", x, *x_ND.shape, x_ND.stride(0), eps, x_ND, weight_D, out, factors_N)
        ctx.save_for_backward(x_ND, weight_D, factors_N)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, _ = ctx.saved_tensors
        d_x, d_weight_D = d_out.new_empty(d_out.shape), torch.empty_like(weight_D)
        inputs = (*ctx.saved_tensors, d_out.contiguous())
        _call("norm_backward", x_ND, *x_ND.shape, x_ND.stride(0), *inputs, d_x, d_weight_D)
        return d_x, d_weight_D, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis."""
    check_floats("x", x)
    check_tensor("weight", weight_D, x.dtype, x.shape[-1])
    return _RMSNorm.apply(x, weight_D, float(eps))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTR: Tensor, rotation_BTr: Tensor) -> Tensor:
        ctx.rotation_BTr = rotation_BTr.contiguous()
        return _rotated(x_BTR, ctx.rotation_BTr, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BTR: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(d_out_BTR, ctx.rotation_BTr, True), None


def _rotated(x_BTR: Tensor, rotation_BTr: Tensor, inverse: bool) -> Tensor:
    x_NR, out_BTR = _rows(x_BTR), x_BTR.new_empty(x_BTR.shape)
    period = rotation_BTr.shape[:-1].numel()
    _call("rotate", x_NR, *x_NR.shape, x_NR.stride(0), period, inverse, x_NR, rotation_BTr, out_BTR)
    return out_BTR


def rotate(x_BTR: Tensor, rotation_BTr: Tensor) -> Tensor:
    """The pairs (0,1), (2,3)... of x, rotated; `rotation` is of each row or of all."""
    check_floats("x", x_BTR, dims=3)
    rows, tokens, width = x_BTR.shape
    _check_rotation(rotation_BTr, rows, tokens, width)
    return _Rotate.apply(x_BTR, rotation_BTr)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor) -> Tensor:
        x_ND, weight_OD = _rows(x), weight_OD.contiguous()
        ctx.sizes = (*x_ND.shape, weight_OD.shape[0], x_ND.stride(0))
        out = x.new_empty(*x.shape[:-1], weight_OD.shape[0])
        _call("linear_forward", x_ND, *ctx.sizes, x_ND, weight_OD, out)
        ctx.save_for_backward(x_ND, weight_OD)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        x_ND, weight_OD = ctx.saved_tensors
        d_x, d_weight_OD = d_out.new_empty(*d_out.shape[:-1], x_ND.shape[1]), torch.empty_like(weight_OD)
        _call("linear_backward", x_ND, *ctx.sizes, x_ND, weight_OD, d_out.contiguous(), d_x, d_weight_OD)
        return d_x, d_weight_OD


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x [..., D] -> [..., O]."""
    check_floats("x", x)
    check_tensor("weight", weight_OD, x.dtype, ANY, x.shape[-1])
    check_even(x.dtype, width=x.shape[-1], outputs=len(weight_OD))
    return _Linear.apply(x, weight_OD)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        inputs = x_ND.contiguous(), weight_VD.contiguous(), targets_N.contiguous()
        ctx.sizes = (*x_ND.shape, weight_VD.shape[0], temperature)
        logprobs_N, logsums_N = torch.empty(x_ND.shape[0]), torch.empty(x_ND.shape[0])
        _call("logprobs_forward", x_ND, *ctx.sizes, *inputs, logprobs_N, logsums_N)
        ctx.save_for_backward(*inputs, logsums_N)
        return logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD = saved = ctx.saved_tensors[:2]
        rows, vocabulary = x_ND.shape[0], weight_VD.shape[0]
        d_logits_cV = x_ND.new_empty(min(rows, max(1, LOGITS // vocabulary)), vocabulary)
        gradients = [torch.empty_like(t) for t in saved]
        inputs = (*ctx.saved_tensors, d_logprobs_N.contiguous(), d_logits_cV.shape[0], d_logits_cV)
        _call("logprobs_backward", x_ND, *ctx.sizes, *inputs, *gradients)
        return *gradients, None, None


def logprobs(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """log softmax(x weight^T / temperature) of each row's target, [N] float32; logits are not kept."""
    check_floats("x", x_ND, dims=2)
    check_tensor("weight", weight_VD, x_ND.dtype, ANY, x_ND.shape[1])
    check_indices("targets", targets_N, len(weight_VD), len(x_ND))
    check_even(x_ND.dtype, width=x_ND.shape[1], vocabulary=len(weight_VD))
    return _Logprobs.apply(x_ND, weight_VD, targets_N, float(temperature))
