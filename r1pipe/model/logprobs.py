"""The language models' head: logits, or log-probabilities of tokens without all [N, V] logits in memory.

Axes: N tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cat, nn
from torch.nn.functional import cross_entropy, linear

from r1pipe.model.kernels import training as kernels
from r1pipe.model.kernels.halves import Halves, in_halves, inputs_first
from r1pipe.model.layers import Linear

LOGITS_IN_MEMORY = 2**25  # the part of [N, V] that a forward pass holds at once (128 MiB in float32)
# What is made of some rows' logits, [c, V] in float32; the slice says which of the N they are. -> [c, ...]
Measure = Callable[[Tensor, slice], Tensor]


class Head(Linear):
    """Gives logits, [..., D] -> [..., V]; the log-probabilities of `targets_N`, [N, D] -> [N] in float32; or
    what `measure` makes of logits, a few rows at a time, [N, D] -> [N, ...].

    The latter two take one call however many the tokens: under ZeRO-3 each call gathers the weight, for which
    every rank must call as often as the others.
    """

    fp32 = False  # logits in float32 also where the weight is not (MiniMax-M1, arXiv 2506.13585)
    # Through the CPU kernels where they run. Their logits are in float32, and so are those of the bundled
    # model's decoder; another library's decoder rounds its own, and its wide products are faster.
    compiled = True

    @classmethod
    def sharing(cls, other: nn.Linear) -> "Head":
        """A head with the weights of another library's, for its decoder: never through the CPU kernels."""
        with torch.device("meta"):
            head = cls(other.in_features, other.out_features)
        head.weight, head.bias = other.weight, other.bias
        head.compiled = False
        return head

    def forward(
        self,
        x: Tensor,
        targets_N: Tensor | None = None,
        temperature: float = 1.0,
        measure: Measure | None = None,
    ) -> Tensor:
        """`temperature` divides the logits of log-probabilities, as in sampling."""
        if measure is not None:
            return self._measured(x, measure)
        if targets_N is None:
            return self._logits(x)
        if self.compiled and self.usable(x, self.out_features):
            return kernels.logprobs(x, self.weight, targets_N, temperature)

        def part(x_cD: Tensor, rows: slice) -> Tensor:
            return logprobs(self._logits, x_cD, targets_N[rows], temperature)

        return self._in_chunks(part, x)

    def _measured(self, x_ND: Tensor, measure: Measure) -> Tensor:
        return self._in_chunks(lambda x_cD, rows: measure(self._logits(x_cD).float(), rows), x_ND)

    def _in_chunks(self, part: Callable[[Tensor, slice], Tensor], x_ND: Tensor) -> Tensor:
        """What `part` gives of some rows, for all of them, with the logits of a chunk in memory at once."""
        chunk = max(1, LOGITS_IN_MEMORY // self.out_features)
        if len(x_ND) <= chunk:
            return part(x_ND, slice(0, len(x_ND)))
        weights = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return _InChunks.apply(part, chunk, torch.is_grad_enabled(), x_ND, *weights)

    def _logits(self, x: Tensor) -> Tensor:
        if not self.fp32 or x.dtype == torch.float32:
            return super().forward(x) if self.compiled else linear(x, self.weight, self.bias)
        logits = _Float32Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return logits if self.bias is None else logits + self.bias.float()


def logprobs(head: Callable[[Tensor], Tensor], x_ND: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """log softmax(head(x) / temperature) of each row's target, [N] in float32."""
    logits_NV = head(x_ND).float()
    if temperature != 1.0:  # dividing by one would copy [N, V]
        logits_NV = logits_NV / temperature
    return -cross_entropy(logits_NV, targets_N, reduction="none")


class _Float32Product(torch.autograd.Function):
    """x weight^T in float32, from narrower types: their products are exact in it, so only sums round.

    A GPU's tensor cores give that as fast as rounded logits; casting both would go through their slow
    float32. The gradients are products in the narrow type, as a plain head's are.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_VD)
        if x_ND.is_cuda:
            return torch.mm(x_ND, weight_VD.t(), out_dtype=torch.float32)
        return linear(x_ND.float(), weight_VD.float())

    @in_halves
    def backward(ctx: Any, d_logits_NV: Tensor) -> Halves:
        (x_ND, weight_VD), (for_x, for_weight) = ctx.saved_tensors, ctx.needs_input_grad
        d_logits_NV = d_logits_NV.to(x_ND.dtype)
        d_x_ND = d_logits_NV @ weight_VD if for_x else None
        return (d_x_ND,), lambda: (d_logits_NV.t() @ x_ND if for_weight else None,)


class _InChunks(torch.autograd.Function):
    """`part(x_cD, rows)` of all rows, which may read the weights; in the backward pass it is run again, once
    for both of its halves."""

    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[[Tensor, slice], Tensor],
        chunk: int,
        learning: bool,
        x_ND: Tensor,
        *weights: nn.Parameter,
    ) -> Tensor:
        ctx.part, ctx.weights = part, weights
        ctx.chunks = [slice(first, first + chunk) for first in range(0, len(x_ND), chunk)]
        ctx.save_for_backward(x_ND)
        with torch.set_grad_enabled(learning):  # the operators that run depend on it
            return cat([part(x_ND[rows].detach(), rows).detach() for rows in ctx.chunks])

    @in_halves
    def backward(ctx: Any, d_outputs: Tensor) -> Halves:
        [x_ND] = ctx.saved_tensors
        d_x_ND, d_weights = torch.empty_like(x_ND), tuple(map(torch.zeros_like, ctx.weights))
        for rows in ctx.chunks:
            x_cD = x_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.part(x_cD, rows)
            with inputs_first(False):
                d_x_ND[rows], *found = torch.autograd.grad(output, [x_cD, *ctx.weights], d_outputs[rows])
            for total, gradient in zip(d_weights, found, strict=True):
                total += gradient
        return (None, None, None, d_x_ND), lambda: d_weights
