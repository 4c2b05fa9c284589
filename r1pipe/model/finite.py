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

    def check(name: str, output: Any) -> None:
        if not broken and not all(_finite(part) for part in _tensors(output)):
            broken.append(name)

    _run_with_hooks(model, check, run)
    return broken[0] if broken else None


def first_nonfinite_gradient(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """The module at whose output the backward pass of the loss from `run` first has a NaN or an infinity.

    None if there is none. It leaves the weights' gradients alone.
    """
    outputs: list[tuple[str, Tensor]] = []

    def collect(name: str, output: Any) -> None:
        outputs.extend((name, part) for part in _tensors(output) if part.requires_grad)

    loss = _run_with_hooks(model, collect, run)
    gradients = torch.autograd.grad(loss, [part for _, part in outputs], allow_unused=True)
    broken = [
        name
        for (name, _), gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and not _finite(gradient)
    ]
    return broken[-1] if broken else None


def _run_with_hooks(model: nn.Module, hook: Callable[[str, Any], None], run: Callable[[], Any]) -> Any:
    """The result of `run`, while `hook` is called with each module's name and output."""
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: hook(name, output))
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


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple) else []


def _finite(part: Tensor) -> bool:
    return not part.is_floating_point() or bool(part.isfinite().all())
