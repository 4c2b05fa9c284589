"""Which layer gave the first value that is not finite: asked only once a loss or a drawn token is not.

The normal step pays nothing for it: the pass is run a second time, with a hook behind every module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_non_finite(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The name of the first module whose output has a NaN or an infinity when `run` uses `model`, or None.

    A module comes after those inside it, so it is the innermost that is named.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(_finite(part) for part in _tensors(output)):
                found.append(name)

        return hook

    _watched(model, look, run)
    return found[0] if found else None


def first_nonfinite_gradient(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """The name of the module at whose output the gradient of the loss that `run` gives, on its way back, is
    first a NaN or an infinity, or None. No gradient of a weight is touched."""
    outputs: list[tuple[str, Tensor]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.extend((name, part) for part in _tensors(output) if part.requires_grad)

        return hook

    loss = _watched(model, look, run)
    gradients = torch.autograd.grad(loss, [part for _, part in outputs], allow_unused=True)
    broken = [
        name
        for (name, _), gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and not _finite(gradient)
    ]
    return broken[-1] if broken else None


def _watched(model: nn.Module, look: Callable[[str], Callable[..., None]], run: Callable[[], Any]) -> Any:
    """What `run` gives, with the hook `look(name)` behind each module meanwhile."""
    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        return run()
    finally:
        for hook in hooks:
            hook.remove()


def not_finite(what: str, layer: str | None) -> str:
    """A sentence on `what`, of which `layer` (see first_non_finite) was the origin."""
    if layer is None:
        return f"{what} is not finite, though every layer's output is"
    return f"{what} is not finite: the first layer to give such values is {layer}"


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple) else []


def _finite(part: Tensor) -> bool:
    return not part.is_floating_point() or bool(part.isfinite().all())
