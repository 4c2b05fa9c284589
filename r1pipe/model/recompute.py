"""Recomputation: keep the inputs of a module alone, and run it again in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

Module = Callable[..., tuple[Tensor, ...]]


def run_again_in_backward(module: Module, *inputs: Any) -> tuple[Tensor, ...]:
    """The module's outputs, a tuple with all that a gradient may come through. Nothing in it is random."""
    return checkpoint(_anchored, module, *inputs, use_reentrant=False, preserve_rng_state=False)


def run_again_from_host(module: Module, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """As above, but until then `x` waits in the host's memory; other inputs, which layers share, stay."""
    with save_on_cpu(pin_memory=x.is_cuda):
        return run_again_in_backward(lambda x: module(x, *inputs), x)


def _anchored(module: Module, *inputs: Any) -> tuple[Tensor, ...]:
    return _Anchor.apply(*module(*inputs))


class _Anchor(torch.autograd.Function):
    """Its inputs, whose gradients need a saved tensor before they go on.

    At the end of a module it makes backward run the module again first. Without it a gradient that enters in
    the middle (through cache entries or a balance loss) would do so when ZeRO-3 has fetched a weight for that
    gradient already, and the run would free the weight.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(outputs[0].new_zeros(1))
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return gradients
