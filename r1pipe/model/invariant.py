"""Decoding through the trainer's own passes: log-probabilities equal to the bit (engine.equal=true).

A token's sums must have one order, whatever is computed beside it. The kernels of training passes give each
row that (kernels.Invariant), and rows that continue a past read their keys by position (mla.position_order).
So the trainer's pass over whole rows and these passes over one token per slot compute the same numbers.
Axes as in layers.py and cache.py.
"""

import torch
from torch import Tensor

from r1pipe.model.cache import Decoder, LatentCache
from r1pipe.model.kernels import training as kernels
from r1pipe.model.transformer import Past


class InvariantDecoder(Decoder):
    """Decoder whose tokens are rows of length one that continue the cache.

    Every step expands the latents of all tokens before, as attention does in training: slower than absorbed.
    """

    logprobs_of = staticmethod(kernels.logprobs_of)

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """As Decoder's, with unrounded logits in float32."""
        entries: list[Tensor] = []
        hidden_BTD = self.model.model(tokens_BT, keep=entries.append)
        last_BD = hidden_BTD[torch.arange(len(lengths_B)), lengths_B - 1]
        self._keep_last(tokens_BT.shape, lengths_B)
        return torch.stack(entries), kernels.logits(last_BD, self.model.lm_head.weight, 1.0)

    @torch.no_grad()
    def decode(self, tokens_S: Tensor, positions_S: Tensor, cache: LatentCache, length: int) -> Tensor:
        """As Decoder's, with unrounded logits in float32."""
        own: list[Tensor] = []
        past = Past(list(cache.entries_LSMW[:, :, : length - 1]), positions_S)
        hidden_S1D = self.model.model(tokens_S.unsqueeze(1), keep=own.append, past=past)
        slots_S = torch.arange(len(tokens_S))
        cache.entries_LSMW[:, slots_S, positions_S] = torch.stack(own).squeeze(2)
        return kernels.logits(hidden_S1D[:, 0], self.model.lm_head.weight, 1.0)
