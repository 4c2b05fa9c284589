"""Backward passes in two halves, as zero-bubble schedules make them (arXiv 2401.10241): first the gradients
of a part's inputs, which the rank before waits for, and later those of its weights.

Of torch's own operators a pass computes the gradients that it is asked for. A function in Python is not told
which those are (`ctx.needs_input_grad` is from the forward pass), and would compute all of them in each half.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]
# What a function gives: the gradients of the arguments before its weights, and what computes those of the
# weights, which are its last arguments.
Halves = tuple[Gradients, Callable[[], Gradients]]

_inputs_first = False  # of the process: on a GPU another thread runs backward


@contextmanager
def inputs_first(first: bool = True) -> Iterator[None]:
    """A block whose backward passes are first halves, each of which one for the weights follows; with
    `first=False`, within such a block, whole ones."""
    global _inputs_first
    before, _inputs_first = _inputs_first, first
    try:
        yield
    finally:
        _inputs_first = before


def in_halves(backward: Callable[..., Halves]) -> Any:
    """Makes the `backward` of a torch.autograd.Function of one that gives both halves.

    The first half of a pass leaves the weights' gradients to be computed in the second: with what they need,
    and without doing again what both need. A function that had no first half gives everything at once.
    """

    def whole_or_half(ctx: Any, *d_results: Tensor) -> Gradients:
        arguments, second_half = len(ctx.needs_input_grad), vars(ctx).pop("second_half", None)
        if second_half is not None:
            found = second_half()
            return (None,) * (arguments - len(found)) + found
        found, of_weights = backward(ctx, *d_results)
        if not _inputs_first:
            return found + of_weights()
        ctx.second_half = of_weights
        return found + (None,) * (arguments - len(found))

    return staticmethod(once_differentiable(whole_or_half))
