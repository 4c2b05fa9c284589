"""What quantising to FP8 did to a model's numbers: counted where it happens, told once per step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from r1pipe.core.errors import NumericProblem
from r1pipe.model.kernels.reference import Scaled


@dataclass
class Count:
    """One kind of layer's activations, weights or gradients since the last `take`."""

    values: int
    found: Tensor  # int64 [3]: with the largest code, flushed to zero, not finite
    smallest: Tensor  # float32, of the scales
    largest: Tensor


# A count on its way between ranks: values, the three of `found`, smallest and largest scale.
Numbers = tuple[float, ...]


class Meter:
    """Counts by kind of layer ("experts") and role ("gradient"), of passes that train alone."""

    def __init__(self) -> None:
        self.on = False  # whether what is quantised now is of a pass that trains
        self._counts: dict[tuple[str, str], Count] = {}

    def counts(self, kind: str, role: str, x: Tensor) -> Tensor | None:
        """Where a backend counts what it finds in `x`; None: it need not."""
        if not self.on:
            return None
        count = self._counts.get((kind, role))
        if count is None:
            found = torch.zeros(3, dtype=torch.int64, device=x.device)
            smallest = torch.full((), torch.inf, device=x.device)
            count = self._counts[kind, role] = Count(0, found, smallest, torch.zeros_like(smallest))
        return count.found

    def saw(self, kind: str, role: str, made: Scaled) -> None:
        """What came of it."""
        if self.on and made.scales.numel():
            count = self._counts[kind, role]
            count.values += made.values.numel()
            smallest, largest = made.scales.aminmax()
            count.smallest = torch.minimum(count.smallest, smallest)
            count.largest = torch.maximum(count.largest, largest)

    def take(self) -> dict[str, Numbers]:
        """What was counted, by "kind/role", and begin anew."""
        taken = {
            f"{kind}/{role}": (
                count.values,
                *count.found.tolist(),
                count.smallest.item(),
                count.largest.item(),
            )
            for (kind, role), count in self._counts.items()
        }
        self._counts.clear()
        return taken


def together(taken: list[dict[str, Numbers]]) -> dict[str, Numbers]:
    """All ranks' counts as one."""
    joined: dict[str, Numbers] = {}
    for of_rank in taken:
        for name, (values, largest, flushed, broken, low, high) in of_rank.items():
            before = joined.get(name, (0, 0, 0, 0, torch.inf, 0.0))
            sums = tuple(a + b for a, b in zip(before[:4], (values, largest, flushed, broken), strict=True))
            joined[name] = (*sums, min(before[4], low), max(before[5], high))
    return joined


def not_finite(joined: dict[str, Numbers]) -> str:
    """Where numbers that were to be quantised were not finite; empty where all were."""
    for name, (_, _, _, broken, _, _) in sorted(joined.items()):
        if broken:
            kind, role = name.split("/")
            return f"FP8: {broken:.0f} numbers of {kind} layers' {role}s were not finite"
    return ""


def metrics(joined: dict[str, Numbers]) -> dict[str, float]:
    """`fp8/KIND/ROLE/...`: shares of values with the largest code and flushed to zero, range of scales.

    The largest value of each tile or block has the largest code (unless scales are powers of two): a share of
    1/128 of activations and gradients, 1/16384 of weights, cuts nothing off. Raises NumericProblem on what
    was not finite.
    """
    if told := not_finite(joined):
        raise NumericProblem(
            f"{told}; lower stage.optim.lr or look at the data; nothing of this step was saved"
        )
    found: dict[str, float] = {}
    for name, (values, largest, flushed, _, low, high) in sorted(joined.items()):
        found |= {
            f"fp8/{name}/saturated": largest / values,
            f"fp8/{name}/flushed": flushed / values,
            f"fp8/{name}/scale_min": low,
            f"fp8/{name}/scale_max": high,
        }
    return found
