"""The passes of a model over micro-batches that an engine trains on or evaluates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from r1pipe.model import Balance, Policy

M = TypeVar("M")


@dataclass
class Pass(Generic[M]):
    """One micro-batch through a model: call it for the loss, or whatever `learn` gives.

    It is in two functions so that ranks of a pipeline can share it: each reads the micro-batch with its
    layers, and the last one learns from the hidden states. The micro-batch is a dataclass of tensors and
    plain values with a property `positions`: the tokens that go through the model, with padding.
    """

    model: Policy
    micro: M
    # hidden states, and what collects the balance losses of the layers that are read
    read: Callable[[Policy, M], tuple[Tensor, Any]]
    # of both: the loss but for the balance loss (or any tensor, where nothing is learned), and what is to be
    # known besides: numbers and tensors, in tuples and dicts
    learn: Callable[[Policy, M, Tensor, Any], tuple[Tensor, Any]]
    balance_weight: float = 0.0  # of the balance loss in the loss; 0: there is none
    balance_scale: float = 1.0  # makes its sum over tokens a share of its mean
    # results:
    found: Any = None
    balance: Tensor | None = None  # this micro-batch's share of the mean balance loss

    def __call__(self) -> Tensor:
        hidden, balances = self.read(self.model, self.micro)
        loss, self.found = self.learn(self.model, self.micro, hidden, balances)
        share = self.share_of(balances)
        if share is None:
            return loss
        self.balance = share.detach()
        return loss + self.balance_weight * share

    def share_of(self, balances: Sequence[Balance]) -> Tensor | None:
        """Of the mean balance loss."""
        if not self.balance_weight:
            return None
        return torch.stack([balance.total() for balance in balances]).sum() * self.balance_scale


def moved(micro: M, device: torch.device) -> M:
    """A dataclass with its tensors on a device."""
    values: Any = micro
    tensors = {f.name: getattr(values, f.name) for f in fields(values)}
    return replace(values, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})
