"""The compiled CPU kernels of training passes, differentiable; torch's operators in model/ compute the same.

Axes as in r1pipe/model/layers.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from r1pipe.core.errors import ConfigError
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.kernels.checks import ANY, check_even, check_floats, check_indices, check_tensor
from r1pipe.model.kernels.differentiable import Differentiable, as_rows, call_for, contiguous, no_weights
from r1pipe.model.kernels.halves import Halves

CHUNK = 512  # tokens whose sums fit a thread's cache
WORTHWHILE = 256  # rows
LOGITS = 2**21  # gradients of logits in memory at once


def usable(x: Tensor, *sizes: int, few: bool = False) -> bool:
    """Whether to use the kernels for `x` [..., D], and weights of its type and of these sizes.

    Each call packs the weights, which a few rows without gradient are not worth, unless `few` asks for it.
    torch.compile cannot trace the kernels, and they do not take empty tensors.
    """
    if torch.compiler.is_compiling() or 0 in (*x.shape, *sizes):
        return False
    worthwhile = few or torch.is_grad_enabled() or x.shape[:-1].numel() >= WORTHWHILE
    if x.device.type != "cpu" or not worthwhile:
        return False
    if x.dtype == torch.bfloat16 and any(n % 2 for n in (x.shape[-1], *sizes)):
        return False  # products take two neighbours at a time
    return runs_here(x.dtype)


class Invariant:
    """A module whose results for a token may be asked to have the same bits whatever is computed beside it.

    The kernels give that: each row is summed in an order of its own. torch's products do not, as they choose
    blocks by the number of rows.
    """

    batch_invariant = False

    def usable(self, x: Tensor, *sizes: int) -> bool:
        """As the function. Raises ConfigError where `batch_invariant` and the kernels cannot be used."""
        found = usable(x, *sizes, few=self.batch_invariant)
        if self.batch_invariant and not found and x.numel():
            raise ConfigError(
                f"engine.equal=true: the CPU kernels cannot compute {type(self).__name__} for {x.dtype} of"
                f" width {x.shape[-1]} here; drop it"
            )
        return found


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
    return _swiglus(x_ND, weights_NK, experts_NK, down_EDI, gate_up_EiD)


def swiglu(x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) of x [..., D]."""
    check_floats("x", x)
    check_tensor("gate", gate_ID, x.dtype, ANY, x.shape[-1])
    check_tensor("up", up_ID, x.dtype, *gate_ID.shape)
    check_tensor("down", down_DI, x.dtype, *gate_ID.shape[::-1])
    check_even(x.dtype, width=x.shape[-1], inner=len(gate_ID))
    return _swiglus(as_rows(x), None, None, down_DI, gate_ID, up_ID).view_as(x)


def _swiglus(x_ND: Tensor, *others: Any) -> Tensor:
    """`others`: routing weights and experts (None for one that all tokens go through), down, and gate with up
    or both. Apart, they are joined again in the backward pass: what is kept are the weights themselves."""
    (_, experts_NK, down, *_), (tokens, width) = others, x_ND.shape
    experts, top_k = (1, 1) if experts_NK is None else (len(down), experts_NK.shape[1])
    inner, chunk = down.shape[-1], min(CHUNK, -(-tokens // (64 * torch.get_num_threads())) * 64)
    sizes = (tokens, top_k, experts, width, inner, chunk)
    rows = tokens * top_k + experts * (-(-tokens // chunk)) * 15  # groups are padded to 16

    def joined(parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def run(*inputs: Any) -> tuple[Tensor | None, ...]:
        x_ND, *routing, down = (own := contiguous(*inputs))[:4]
        inner_ri, out_ND = x_ND.new_empty(rows, 2 * inner), x_ND.new_empty(tokens, width)
        call_for("experts_forward", x_ND, *sizes, x_ND, joined(own[4:]), down, *routing, inner_ri, out_ND)
        return out_ND, inner_ri, *own

    def gradients(d_out_ND: Tensor, inner_ri: Tensor, *kept: Any) -> Halves:
        x_ND, weights_NK, experts_NK, down, *parts = kept
        d_out_ND, d_x_ND = d_out_ND.contiguous(), torch.empty_like(x_ND)
        d_weights_NK = None if weights_NK is None else torch.empty_like(weights_NK)
        hidden_rI, d_inner_ri = x_ND.new_empty(rows, inner), torch.empty_like(inner_ri)
        inputs = (joined(parts), down, weights_NK, experts_NK, inner_ri, d_out_ND)
        both = (hidden_rI, d_inner_ri)
        call_for("experts_backward_inputs", x_ND, *sizes, *inputs, *both, d_x_ND, d_weights_NK)

        def of_weights() -> tuple[Tensor, ...]:
            d_gate_up = x_ND.new_empty(len(parts) * len(parts[0]), *parts[0].shape[1:])
            d_down = torch.empty_like(down)
            inputs = (x_ND, experts_NK, *both, d_out_ND)
            call_for("experts_backward_weights", x_ND, *sizes, *inputs, d_gate_up, d_down)
            return d_down, *d_gate_up.chunk(len(parts))

        return (d_x_ND, d_weights_NK, None), of_weights

    return Differentiable.apply(run, gradients, x_ND, *others)


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
    stride = 0 if rotation_BTr.shape[0] == 1 else tokens * rope
    sizes = (rows, tokens, keys, heads, nope, rope, value, stride, scale)

    def run(query_BTHq: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = contiguous(query_BTHq, *others)
        out_BTHv = query_BTHq.new_empty(rows, tokens, heads, value)
        logsums_BHT = torch.empty(rows, heads, tokens)
        call_for("attention_forward", query_BTHq, *sizes, *inputs, out_BTHv, logsums_BHT)
        return out_BTHv, *inputs, out_BTHv, logsums_BHT

    def gradients(d_out_BTHv: Tensor, *kept: Tensor) -> Halves:
        found = [torch.empty_like(t) for t in kept[:3]]
        call_for("attention_backward", kept[0], *sizes, *kept, d_out_BTHv.contiguous(), *found)
        return (*found, None, None), no_weights

    inputs = query_BTHq, key_value_BMHw, key_rope_BMR, rotation_BTr, mask_BTM
    return Differentiable.apply(run, gradients, *inputs)


def _check_rotation(rotation_BTr: Tensor, rows: int, tokens: int, width: int) -> None:
    check_tensor("rotation", rotation_BTr, torch.complex64, ANY, tokens, width // 2)
    if width % 2 or len(rotation_BTr) not in (1, rows):
        raise ValueError(f"a rotation of {len(rotation_BTr)} rows does not fit {rows} rows of width {width}")


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis."""
    check_floats("x", x)
    check_tensor("weight", weight_D, x.dtype, x.shape[-1])

    def run(x: Tensor, weight_D: Tensor) -> tuple[Tensor, ...]:
        x_ND, weight_D = as_rows(x), weight_D.contiguous()
        out, factors_N = x.new_empty(x.shape), torch.empty(x_ND.shape[0])
        call_for("norm_forward", x, *x_ND.shape, x_ND.stride(0), float(eps), x_ND, weight_D, out, factors_N)
        return out, x_ND, weight_D, factors_N

    def gradients(d_out: Tensor, x_ND: Tensor, weight_D: Tensor, factors_N: Tensor) -> Halves:
        d_x, d_weight_D = d_out.new_empty(d_out.shape), torch.empty_like(weight_D)
        inputs = (x_ND, weight_D, factors_N, d_out.contiguous())
        call_for("norm_backward", x_ND, *x_ND.shape, x_ND.stride(0), *inputs, d_x, d_weight_D)
        return (d_x,), lambda: (d_weight_D,)

    return Differentiable.apply(run, gradients, x, weight_D)


def rotate(x_BTR: Tensor, rotation_BTr: Tensor) -> Tensor:
    """The pairs (0,1), (2,3)... of x, rotated; `rotation` is of each row or of all."""
    check_floats("x", x_BTR, dims=3)
    rows, tokens, width = x_BTR.shape
    _check_rotation(rotation_BTr, rows, tokens, width)
    rotation_BTr = rotation_BTr.contiguous()

    def rotated(x_BTR: Tensor, inverse: bool) -> tuple[Tensor]:
        x_NR, out_BTR = as_rows(x_BTR), x_BTR.new_empty(x_BTR.shape)
        period = rotation_BTr.shape[:-1].numel()
        call_for("rotate", x_NR, *x_NR.shape, x_NR.stride(0), period, inverse, x_NR, rotation_BTr, out_BTR)
        return (out_BTR,)

    def gradients(d_out_BTR: Tensor) -> Halves:
        return rotated(d_out_BTR, inverse=True), no_weights

    return Differentiable.apply(partial(rotated, inverse=False), gradients, x_BTR)


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x [..., D] -> [..., O]."""
    check_floats("x", x)
    check_tensor("weight", weight_OD, x.dtype, ANY, x.shape[-1])
    check_even(x.dtype, width=x.shape[-1], outputs=len(weight_OD))

    def run(x: Tensor, weight_OD: Tensor) -> tuple[Tensor, ...]:
        x_ND, weight_OD = as_rows(x), weight_OD.contiguous()
        out = x.new_empty(*x.shape[:-1], len(weight_OD))
        call_for("linear_forward", x_ND, *x_ND.shape, len(weight_OD), x_ND.stride(0), x_ND, weight_OD, out)
        return out, x_ND, weight_OD

    def gradients(d_out: Tensor, x_ND: Tensor, weight_OD: Tensor) -> Halves:
        d_out, d_x = d_out.contiguous(), d_out.new_empty(*d_out.shape[:-1], x_ND.shape[1])
        sizes = (*x_ND.shape, len(weight_OD))
        call_for("linear_backward_inputs", x_ND, *sizes, weight_OD, d_out, d_x)

        def of_weights() -> tuple[Tensor]:
            d_weight_OD = torch.empty_like(weight_OD)
            call_for("linear_backward_weights", x_ND, *sizes, x_ND.stride(0), x_ND, d_out, d_weight_OD)
            return (d_weight_OD,)

        return (d_x,), of_weights

    return Differentiable.apply(run, gradients, x, weight_OD)


def logprobs(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """log softmax(x weight^T / temperature) of each row's target, [N] float32; logits are not kept."""
    check_floats("x", x_ND, dims=2)
    check_tensor("weight", weight_VD, x_ND.dtype, ANY, x_ND.shape[1])
    check_indices("targets", targets_N, len(weight_VD), len(x_ND))
    check_even(x_ND.dtype, width=x_ND.shape[1], vocabulary=len(weight_VD))
    rows, vocabulary = len(x_ND), len(weight_VD)
    sizes = (*x_ND.shape, vocabulary, float(temperature))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        x_ND, targets_N, weight_VD = (tensor.contiguous() for tensor in inputs)
        logprobs_N, logsums_N = torch.empty(rows), torch.empty(rows)
        call_for("logprobs_forward", x_ND, *sizes, x_ND, weight_VD, targets_N, logprobs_N, logsums_N)
        return logprobs_N, x_ND, weight_VD, targets_N, logsums_N

    def gradients(d_logprobs_N: Tensor, *kept: Tensor) -> Halves:
        d_logits_cV = kept[0].new_empty(min(rows, max(1, LOGITS // vocabulary)), vocabulary)
        inputs = (*kept, d_logprobs_N.contiguous())
        d_x_ND, d_weight_VD = (torch.empty_like(t) for t in kept[:2])
        outputs = (len(d_logits_cV), d_logits_cV, d_x_ND, d_weight_VD)
        call_for("logprobs_backward", kept[0], *sizes, *inputs, *outputs)
        return (d_x_ND, None), lambda: (d_weight_VD,)  # at once: the gradients of all logits are not kept

    return Differentiable.apply(run, gradients, x_ND, targets_N, weight_VD)


def logits(x_ND: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    """x weight^T / temperature, [N, V] float32, as `logprobs` sums it; without gradient."""
    check_floats("x", x_ND, dims=2)
    check_tensor("weight", weight_VD, x_ND.dtype, ANY, x_ND.shape[1])
    check_even(x_ND.dtype, width=x_ND.shape[1], vocabulary=len(weight_VD))
    logits_NV = torch.empty(len(x_ND), len(weight_VD))
    sizes = (*x_ND.shape, len(weight_VD), float(temperature))
    call_for("logits_forward", x_ND, *sizes, x_ND.contiguous(), weight_VD.contiguous(), logits_NV)
    return logits_NV


def logprobs_of(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax of each row's target, [N] float32, summed as in `logprobs`; without gradient."""
    check_tensor("logits", logits_NV, torch.float32, ANY, ANY)
    check_indices("targets", targets_N, logits_NV.shape[1], len(logits_NV))
    logprobs_N = torch.empty(len(logits_NV))
    call_for("logprobs_of_logits", logits_NV, *logits_NV.shape, *contiguous(logits_NV, targets_N), logprobs_N)
    return logprobs_N
