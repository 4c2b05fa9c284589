"""What balances the experts in a forward pass: their loads, and the sequence-wise loss (V3 section 2.1.2)."""

import torch
from torch import Tensor

from r1pipe.model.moe import Routing


class Balance:
    """Which tokens of a forward pass count in the experts' loads, and the balance loss where it is asked for.

    Give it to the pass, then ask for `total()`; the sequences are the documents of packed rows.
    """

    def __init__(self, segments_BT: Tensor, with_loss: bool):
        """`segments_BT` numbers the documents of each row from 1; 0 (padding) is left out."""
        rows_B1 = torch.arange(len(segments_BT), device=segments_BT.device).unsqueeze(1)
        self._apart_BT = segments_BT + rows_B1 * segments_BT.max()  # numbers of one row are no other row's
        self._counted_BT = segments_BT != 0
        self._with_loss = with_loss
        self._routings: list[Routing] = []

    @classmethod
    def of_lengths(cls, lengths_B: Tensor, width: int, with_loss: bool) -> "Balance":
        """Of rows of `width` tokens, each one sequence of so many tokens that is filled up on the right."""
        places_T = torch.arange(width, device=lengths_B.device)
        return cls((places_T < lengths_B.unsqueeze(1)).long(), with_loss)

    def routing(self, among_BT: Tensor | None = None) -> Routing:
        """What the next layer's gate is to be given; `among_BT` leaves out more tokens than the padding."""
        counted_BT = self._counted_BT if among_BT is None else self._counted_BT & among_BT
        self._routings.append(Routing(counted_BT, self._apart_BT * counted_BT if self._with_loss else None))
        return self._routings[-1]

    def total(self) -> Tensor:
        """Sum over layers and documents of T sum_i f_i P_i; the loss is alpha times its mean over tokens."""
        layers = [routing.balance for routing in self._routings if routing.balance is not None]
        return torch.stack(layers).sum() if layers else torch.zeros(())

    @property
    def experts(self) -> list[Tensor]:
        """The experts_NK that each MoE layer has chosen, first layer first."""
        return [routing.experts_NK for routing in self._routings if routing.experts_NK is not None]
