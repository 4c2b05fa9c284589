"""The sequence-wise balance loss of a forward pass (V3 section 2.1.2, equations 17 to 20)."""

import torch
from torch import Tensor

from r1pipe.model.moe import Routing


class Balance:
    """Give it to a forward pass, then ask for `total()`; the sequences are the documents of packed rows."""

    def __init__(self, segments_BT: Tensor):
        """`segments_BT` numbers the documents of each row from 1; 0 (padding) is left out."""
        rows_B1 = torch.arange(len(segments_BT), device=segments_BT.device).unsqueeze(1)
        apart_BT = segments_BT + rows_B1 * segments_BT.max()  # numbers of one row are no other row's
        self._documents_BT = torch.where(segments_BT == 0, 0, apart_BT)
        self._routings: list[Routing] = []

    @classmethod
    def of_lengths(cls, lengths_B: Tensor, width: int) -> "Balance":
        """Of rows of `width` tokens, each one sequence of so many tokens that is filled up on the right."""
        return cls((torch.arange(width, device=lengths_B.device) < lengths_B.unsqueeze(1)).long())

    def routing(self, counted_BT: Tensor | None = None) -> Routing:
        """What the next layer's gate is to be given; `counted_BT` leaves out more tokens than the padding."""
        documents_BT = self._documents_BT
        self._routings.append(Routing(documents_BT if counted_BT is None else documents_BT * counted_BT))
        return self._routings[-1]

    def total(self) -> Tensor:
        """Sum over layers and documents of T sum_i f_i P_i; the loss is alpha times its mean over tokens."""
        layers = [routing.balance for routing in self._routings if routing.balance is not None]
        return torch.stack(layers).sum() if layers else torch.zeros(())
