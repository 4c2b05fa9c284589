"""Which layer gave the first value that is not finite: asked only once a loss or a drawn token is not.

The normal step pays nothing for it: the pass is run a second time, with a hook behind every module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.errors import NumericProblem


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

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def not_finite(what: str, layer: str | None) -> NumericProblem:
    """The error for `what`, of which `layer` (see first_non_finite) was the origin."""
    if layer is None:
        return NumericProblem(
            f"{what} is not finite, though every layer's output is: look at stage.optim.lr and at the data; "
            "nothing of this step was saved"
        )
    return NumericProblem(
        f"{what} is not finite: the first layer to give such values is {layer}; lower stage.optim.lr, or "
        "start from an earlier checkpoint if its weights are damaged; nothing of this step was saved"
    )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple) else []


def _finite(part: Tensor) -> bool:
    return not part.is_floating_point() or bool(part.isfinite().all())
