"""Why an optimizer step had to be skipped: all ranks look for what was not finite, and tell one another."""

from collections.abc import Callable, Sequence
from math import isfinite

from torch import Tensor, nn

from r1pipe.model.finite import first_non_finite, first_nonfinite_gradient, not_finite
from r1pipe.train.engine.ranks import Ranks

MicroLosses = Sequence[Callable[[], Tensor]]


def origin(
    ranks: Ranks, model: nn.Module, micro_losses: MicroLosses, losses: Sequence[float], partitioned: bool
) -> str:
    """What was not finite in a step, and the first layer to give it, of the first rank that has such a thing;
    the same on all ranks, which all call.

    `losses` are those of this rank's micro-batches. Where weights are `partitioned` (ZeRO-3), every pass
    takes all ranks; there the layer is known of a loss alone.
    """
    loss = _broken_loss(ranks, model, micro_losses, losses, partitioned)
    if loss is not None:
        return loss
    layers = [] if partitioned else _broken_gradients(ranks, model, micro_losses)
    where = f", first at the output of {layers[0]}" if layers else ""
    return f"the gradient is not finite while the loss is: backward overflowed{where}"


def _broken_loss(
    ranks: Ranks, model: nn.Module, micro_losses: MicroLosses, losses: Sequence[float], partitioned: bool
) -> str | None:
    number = next((n for n, loss in enumerate(losses) if not isfinite(loss)), None)
    layer = None
    if number is not None or partitioned:
        layer = first_non_finite(model, micro_losses[-1 if number is None else number])
    told = ranks.all_gather_objects(None if number is None else (losses[number], layer))
    broken = [one for one in told if one is not None]
    return not_finite(f"the loss ({broken[0][0]:g})", broken[0][1]) if broken else None


def _broken_gradients(ranks: Ranks, model: nn.Module, micro_losses: MicroLosses) -> list[str]:
    """The layers, one of each rank that has one, where the gradient is first not finite."""
    mine = (first_nonfinite_gradient(model, closure) for closure in micro_losses)
    found = next((layer for layer in mine if layer), None)
    return [layer for layer in ranks.all_gather_objects(found) if layer]
