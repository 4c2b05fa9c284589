"""Products in FP8 with their gradients, as DeepSeek-V3 trains (V3 section 3.3).

Fprop, Dgrad and Wgrad of a layer run in FP8 on a backend (see `choice.py`). What backward needs is kept in
FP8: inputs, weights, and the input of SwiGLU, whose output is computed again. Wgrad adds up along tokens, so
its operands are quantised along tokens: the gradient from what arrived, the activation from what was kept.

Axes as in r1pipe/model/layers.py, and: O outputs; T tokens sorted by expert; i = 2I, gate first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from r1pipe.model.kernels.halves import Halves, in_halves
from r1pipe.model.kernels.meter import Meter
from r1pipe.model.kernels.reference import Scaled, dequantise, transposed


class FP8:
    """How a model multiplies: backend, scales and counts. One object for all layers of a model."""

    def __init__(self, backend: Any, power_of_two: bool):
        """`power_of_two`: scales are powers of two (UE8M0)."""
        self.backend, self.power_of_two = backend, power_of_two
        self.meter = Meter()
        self._cache: dict[int, Scaled] | None = None  # id of a weight -> quantised, within `held`

    def __deepcopy__(self, memo: Any) -> "FP8":
        """A copy of a model computes as the model does."""
        return self

    def linear(self, x: Tensor, weight_OD: Tensor, kind: str) -> Tensor:
        """x [..., D] -> [..., O]."""
        self.meter.on = torch.is_grad_enabled()
        out_NO = _Linear.apply(self, kind, x.reshape(-1, x.shape[-1]), weight_OD)
        return out_NO.view(*x.shape[:-1], -1)

    def swiglu(self, x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor, kind: str) -> Tensor:
        """down(silu(gate(x)) * up(x)) of x [..., D]."""
        self.meter.on = torch.is_grad_enabled()
        x_ND = x.reshape(-1, x.shape[-1])
        ends = torch.full((1,), len(x_ND), dtype=torch.int32, device=x.device)
        return _SwiGLU.apply(self, kind, x_ND, None, None, ends, down_DI, gate_ID, up_ID).view_as(x)

    def experts(
        self,
        x_ND: Tensor,
        gate_up_EiD: Tensor,
        down_EDI: Tensor,
        weights_NK: Tensor,
        experts_NK: Tensor,
        kind: str,
    ) -> Tensor:
        """Weighted sum of the chosen experts' SwiGLUs, [N, D]."""
        self.meter.on = torch.is_grad_enabled()
        chosen, order = experts_NK.flatten().sort(stable=True)
        experts = torch.arange(len(down_EDI), device=x_ND.device)
        ends_E = torch.searchsorted(chosen, experts, right=True, out_int32=True)
        weights_T = weights_NK.flatten().index_select(0, order)
        tokens_T = order // experts_NK.shape[1]
        return _SwiGLU.apply(self, kind, x_ND, weights_T, tokens_T, ends_E, down_EDI, gate_up_EiD)

    def rounded(self, x: Tensor) -> Tensor:
        """x [..., C] as a product would read it, in its own type; without gradient."""
        tiles = self.backend.quantise_tiles(x.reshape(-1, x.shape[-1]), self.power_of_two)
        return dequantise(tiles, x.dtype).view_as(x)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For sampling: quantise each weight once in this block, in which no weight may change."""
        self._cache = {}
        try:
            yield
        finally:
            self._cache = None

    def counted(self, kind: str, role: str, quantise: Any, x: Tensor, *arguments: Any) -> Any:
        """Quantise with a function of the backend, and count its (first) result."""
        counts = self.meter.counts(kind, role, x)
        result = quantise(x, *arguments, self.power_of_two, counts)
        self.meter.record(kind, role, result if isinstance(result, Scaled) else result[0])
        return result

    def tiles(self, kind: str, x_ND: Tensor) -> Scaled:
        return self.counted(kind, "activation", self.backend.quantise_tiles, x_ND)

    def weight(self, kind: str, *parts: Tensor) -> Scaled:
        """Parts joined along their rows, in blocks."""
        if self._cache is not None and id(parts[0]) in self._cache:
            return self._cache[id(parts[0])]
        whole = torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
        quantised = self.counted(kind, "weight", self.backend.quantise_blocks, whole)
        if self._cache is not None:
            self._cache[id(parts[0])] = quantised
        return quantised

    def gradient(self, kind: str, d_out: Tensor, ends_E: Tensor) -> tuple[Scaled, Scaled]:
        """A gradient [T, C] in tiles (for Dgrad) and in tiles along tokens (for Wgrad)."""
        return self.counted(kind, "gradient", self.backend.quantise_both, d_out, ends_E)


class Quantisable:
    """A module whose products may run in FP8 (model/training.py chooses which do)."""

    fp8: FP8 | None = None  # None: it multiplies in its own type
    kind = ""  # the part of the model, for the counts


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fp8: FP8, kind: str, x_ND: Tensor, weight_OD: Tensor) -> Tensor:
        x, weight = fp8.tiles(kind, x_ND), fp8.weight(kind, weight_OD)
        ctx.fp8, ctx.kind = fp8, kind
        ctx.save_for_backward(*x, *weight)
        return fp8.backend.multiply(x, weight, x_ND.dtype)

    @in_halves
    def backward(ctx: Any, d_out_NO: Tensor) -> Halves:
        fp8, backend = ctx.fp8, ctx.fp8.backend
        fp8.meter.on = True
        x, weight = _pairs(ctx.saved_tensors)
        ends = torch.full((1,), len(d_out_NO), dtype=torch.int32, device=d_out_NO.device)
        d_tiles, d_tokens = fp8.gradient(ctx.kind, d_out_NO, ends)
        d_x_ND = backend.multiply(d_tiles, transposed(weight), d_out_NO.dtype)

        def of_weights() -> tuple[Tensor]:
            x_tokens = backend.requantise_tokens(x, ends, fp8.power_of_two)
            return (backend.multiply(d_tokens, x_tokens, torch.float32),)

        return (None, None, d_x_ND), of_weights


class _SwiGLU(torch.autograd.Function):
    """The SwiGLUs of experts, or (without `tokens_T`, with one expert) of all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        fp8: FP8,
        kind: str,
        x_ND: Tensor,
        weights_T: Tensor | None,
        tokens_T: Tensor | None,
        ends_E: Tensor,
        down: Tensor,
        *gate_up: Tensor,
    ) -> Tensor:
        x, up, down8 = fp8.tiles(kind, x_ND), fp8.weight(kind, *gate_up), fp8.weight(kind, down)
        gate_up_Ti = _products(fp8.backend, _gather(x, tokens_T), up, ends_E, x_ND.dtype)
        inner = fp8.counted(kind, "activation", fp8.backend.swiglu_quantise, gate_up_Ti, weights_T)
        out_TD = _products(fp8.backend, inner, down8, ends_E, x_ND.dtype)
        kept = fp8.tiles(kind, gate_up_Ti)
        ctx.fp8, ctx.kind, ctx.parts = fp8, kind, len(gate_up)
        ctx.save_for_backward(weights_T, tokens_T, ends_E, *x, *kept, *up, *down8)
        return _scatter_add(out_TD, tokens_T, len(x_ND))

    @in_halves
    def backward(ctx: Any, d_out_ND: Tensor) -> Halves:
        fp8, kind, backend, dtype = ctx.fp8, ctx.kind, ctx.fp8.backend, d_out_ND.dtype
        fp8.meter.on = True
        parts, (weights_T, tokens_T, ends_E, *saved) = ctx.parts, ctx.saved_tensors
        x, kept, up, down = _pairs(saved)
        d_out_TD = d_out_ND if tokens_T is None else d_out_ND.index_select(0, tokens_T)
        d_tiles, d_out_tokens = fp8.gradient(kind, d_out_TD, ends_E)
        d_inner_TI = _products(backend, d_tiles, transposed(down), ends_E, dtype)
        inner_TI, d_gate_up_Ti, d_weights_T = backend.swiglu_backward(kept, weights_T, d_inner_TI)
        d_tiles, d_gate_up_tokens = fp8.gradient(kind, d_gate_up_Ti, ends_E)
        d_x_TD = _products(backend, d_tiles, transposed(up), ends_E, dtype)
        d_x_ND = _scatter_add(d_x_TD, tokens_T, len(d_out_ND))

        def of_weights() -> tuple[Tensor, ...]:
            inner_tokens = backend.quantise_tokens(inner_TI, ends_E, fp8.power_of_two)
            d_down = _outer(backend, d_out_tokens, inner_tokens, ends_E)
            x_tokens = backend.requantise_tokens(_gather(x, tokens_T), ends_E, fp8.power_of_two)
            d_up = _outer(backend, d_gate_up_tokens, x_tokens, ends_E)
            return (d_down, d_up) if tokens_T is not None else (d_down[0], *d_up[0].chunk(parts))

        return (None, None, d_x_ND, None if tokens_T is None else d_weights_T, None, None), of_weights


def _pairs(tensors: Sequence[Tensor]) -> list[Scaled]:
    return [Scaled(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


def _gather(x: Scaled, tokens_T: Tensor | None) -> Scaled:
    """The rows `tokens_T`, gathered in FP8: an eighth of the traffic of float32."""
    if tokens_T is None:
        return x
    values = x.values.view(torch.uint8).index_select(0, tokens_T).view(x.values.dtype)
    return Scaled(values, x.scales.index_select(0, tokens_T))


def _scatter_add(out_TD: Tensor, tokens_T: Tensor | None, rows: int) -> Tensor:
    """The sum of each token's rows, [N, D]."""
    if tokens_T is None:
        return out_TD
    return out_TD.new_zeros(rows, out_TD.shape[1]).index_add_(0, tokens_T, out_TD)


def _products(backend: Any, a: Scaled, b: Scaled, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's product, or that of one matrix [O, D] for all."""
    if b.values.ndim == 2:
        return backend.multiply(a, b, dtype)
    return backend.grouped_multiply(a, b, ends_E, dtype)


def _outer(backend: Any, a: Scaled, b: Scaled, ends_E: Tensor) -> Tensor:
    if len(ends_E) == 1:
        return backend.multiply(a, b, torch.float32).unsqueeze(0)
    return backend.grouped_outer(a, b, ends_E, torch.float32)
