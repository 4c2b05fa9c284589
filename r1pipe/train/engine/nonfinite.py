"""Why an optimizer step was skipped: where its loss or gradient stopped being finite."""

from collections.abc import Callable, Sequence
from math import isfinite

from torch import Tensor, nn

from r1pipe.model.finite import first_non_finite, first_nonfinite_gradient, not_finite
from r1pipe.train.engine.ranks import Ranks


def locate_nonfinite(
    ranks: Ranks,
    model: nn.Module,
    micro_losses: Sequence[Callable[[], Tensor]],
    losses: Sequence[float],
    partitioned: bool,
) -> str:
    """What was not finite in a step and the first layer that produced it; all ranks call and get the same.

    `losses` are those of this rank's micro-batches. With `partitioned` weights (ZeRO-3) every pass needs all
    ranks, so the layer of a gradient is not located.
    """
    number = next((n for n, loss in enumerate(losses) if not isfinite(loss)), None)
    layer = None
    if number is not None or partitioned:
        layer = first_non_finite(model, micro_losses[-1 if number is None else number])
    for broken in ranks.all_gather_objects(None if number is None else (losses[number], layer)):
        if broken is not None:
            loss, layer = broken
            return not_finite(f"the loss ({loss:g})", layer)

    layers: list[str | None] = []
    if not partitioned:
        local = (first_nonfinite_gradient(model, closure) for closure in micro_losses)
        layers = ranks.all_gather_objects(next(filter(None, local), None))
    where = next((f", first at the output of {layer}" for layer in layers if layer), "")
    return f"the gradient is not finite while the loss is: backward overflowed{where}"
