"""The language models' head: logits, or log-probabilities of tokens without all [N, V] logits in memory.

Axes: N tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cat, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from r1pipe.model.kernels import training as kernels
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
        chunk = max(1, LOGITS_IN_MEMORY // self.out_features)
        if len(x) <= chunk:
            return logprobs(self._logits, x, targets_N, temperature)
        parts = [  # logits are computed again in the backward pass
            checkpoint(logprobs, self._logits, x_cD, targets_c, temperature, use_reentrant=False)
            for x_cD, targets_c in zip(x.split(chunk), targets_N.split(chunk), strict=True)
        ]
        return cat(parts)

    def _measured(self, x_ND: Tensor, measure: Measure) -> Tensor:
        chunk = max(1, LOGITS_IN_MEMORY // self.out_features)
        parts = [slice(first, first + chunk) for first in range(0, max(1, len(x_ND)), chunk)]

        def part(x_cD: Tensor, rows: slice) -> Tensor:
            return measure(self._logits(x_cD).float(), rows)

        if len(parts) == 1:
            return part(x_ND, parts[0])
        return cat([checkpoint(part, x_ND[rows], rows, use_reentrant=False) for rows in parts])

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

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ND, weight_VD = ctx.saved_tensors
        d_logits_NV = d_outputs[0].to(x_ND.dtype)
        d_x_ND = d_logits_NV @ weight_VD if ctx.needs_input_grad[0] else None
        d_weight_VD = d_logits_NV.t() @ x_ND if ctx.needs_input_grad[1] else None
        return d_x_ND, d_weight_VD
