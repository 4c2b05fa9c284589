"""Finds the layer that gave the first value that is not finite, after a loss or a sampled token was not.

It runs the pass a second time with a hook on every module, so that normal steps cost nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_non_finite(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The name of the first module whose output has a NaN or an infinity when `run` uses `model`, or None.

    Modules finish after those inside them, so this is the innermost module.
    """
    broken: list[str] = []

    def check(name: str, part: Tensor) -> None:
        if not broken and not part.isfinite().all():
            broken.append(name)

    _run_with_hooks(model, check, run)
    return broken[0] if broken else None


def first_nonfinite_gradient(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """The module at whose output the backward pass of the loss from `run` first has a NaN or an infinity.

    None if there is none. It leaves the weights' gradients alone.
    """
    outputs: list[tuple[str, Tensor]] = []

    def collect(name: str, part: Tensor) -> None:
        if part.requires_grad:
            outputs.append((name, part))

    loss = _run_with_hooks(model, collect, run)
    gradients = torch.autograd.grad(loss, [part for _, part in outputs], allow_unused=True)
    broken = [
        name
        for (name, _), gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and not gradient.isfinite().all()
    ]
    return broken[-1] if broken else None


def _run_with_hooks(model: nn.Module, hook: Callable[[str, Tensor], None], run: Callable[[], Any]) -> Any:
    """The result of `run`, while `hook` is called with each module's name and the tensors that it returns."""

    def watch(name: str, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor):
                hook(name, part)

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: watch(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        return run()
    finally:
        for handle in hooks:
            handle.remove()


def not_finite(what: str, layer: str | None) -> str:
    """A message that `what` is not finite because of `layer` (see first_non_finite)."""
    if layer is None:
        return f"{what} is not finite, though every layer's output is"
    return f"{what} is not finite: the first layer with such values is {layer}"
