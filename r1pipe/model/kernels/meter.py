"""How quantising to FP8 changes a model's numbers: counted on the device, read once per step."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from r1pipe.core.errors import NumericProblem
from r1pipe.model.kernels.reference import Scaled


class Totals(NamedTuple):
    """Counts of values, and the range of their scales."""

    values: float
    saturated: float  # with the largest code
    flushed: float  # nonzero values that became zero
    not_finite: float
    scale_min: float
    scale_max: float


@dataclass
class _Counts:
    """The same on the device, since the last `take`."""

    values: int
    codes: Tensor  # int64 [3]: saturated, flushed, not finite
    scale_min: Tensor  # float32
    scale_max: Tensor


class Meter:
    """Counts by kind of layer ("experts") and role ("gradient"), in training passes only."""

    def __init__(self) -> None:
        self.on = False  # whether the current pass trains
        self._counts: dict[tuple[str, str], _Counts] = {}

    def counts(self, kind: str, role: str, x: Tensor) -> Tensor | None:
        """The int64 [3] to which a backend adds the counts of `x`; None outside training."""
        if not self.on:
            return None
        if (kind, role) not in self._counts:
            codes = torch.zeros(3, dtype=torch.int64, device=x.device)
            infinity = torch.full((), torch.inf, device=x.device)
            self._counts[kind, role] = _Counts(0, codes, infinity, torch.zeros_like(infinity))
        return self._counts[kind, role].codes

    def record(self, kind: str, role: str, quantised: Scaled) -> None:
        """Count the values and scales that `counts` was for."""
        if self.on and quantised.scales.numel():
            counts = self._counts[kind, role]
            counts.values += quantised.values.numel()
            smallest, largest = quantised.scales.aminmax()
            counts.scale_min = torch.minimum(counts.scale_min, smallest)
            counts.scale_max = torch.maximum(counts.scale_max, largest)

    def take(self) -> dict[str, Totals]:
        """The totals by "kind/role"; counting starts again from zero."""
        totals = {}
        for (kind, role), counts in self._counts.items():
            scales = counts.scale_min.item(), counts.scale_max.item()
            totals[f"{kind}/{role}"] = Totals._make((counts.values, *counts.codes.tolist(), *scales))
        self._counts.clear()
        return totals


def together(of_ranks: list[dict[str, Totals]]) -> dict[str, Totals]:
    """All ranks' totals as one, sorted by name."""
    joined: dict[str, Totals] = {}
    for name in sorted({name for totals in of_ranks for name in totals}):
        *counts, lows, highs = zip(*(totals[name] for totals in of_ranks if name in totals), strict=True)
        joined[name] = Totals._make((*map(sum, counts), min(torch.inf, *lows), max(0.0, *highs)))
    return joined


def not_finite(totals: dict[str, Totals]) -> str:
    """The first layers that had to quantise values that are not finite; empty where there are none."""
    for name, total in totals.items():
        if total.not_finite:
            kind, role = name.split("/")
            return f"FP8: {total.not_finite:.0f} numbers of {kind} layers' {role}s were not finite"
    return ""


def metrics(totals: dict[str, Totals]) -> dict[str, float]:
    """`fp8/KIND/ROLE/...`: shares of saturated and flushed values, range of scales.

    The largest value of each tile or block has the largest code (unless scales are powers of two): a share of
    1/128 of activations and gradients, 1/16384 of weights, cuts nothing off. Raises NumericProblem for values
    that are not finite.
    """
    if problem := not_finite(totals):
        raise NumericProblem(
            f"{problem}; lower stage.optim.lr or check the data; nothing of this step was saved"
        )
    values: dict[str, float] = {}
    for name, total in totals.items():
        values[f"fp8/{name}/saturated"] = total.saturated / total.values
        values[f"fp8/{name}/flushed"] = total.flushed / total.values
        values[f"fp8/{name}/scale_min"] = total.scale_min
        values[f"fp8/{name}/scale_max"] = total.scale_max
    return values
