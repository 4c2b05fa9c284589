"""Decoding on the latent cache, which holds each token's latent and one rotated key: C+R numbers.

Axes as in layers.py; M is the cache's length, W = C+R the width of an entry.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from r1pipe.model.moe import gates
from r1pipe.model.transformer import DecoderLayer, DeepseekV3


class LatentCache:
    """Entries of `slots` sequences of up to `length` tokens: entries_LSMW, latent then rotated key."""

    def __init__(self, model: DeepseekV3, slots: int, length: int):
        config, weight = model.config, model.lm_head.weight
        width = config.kv_lora_rank + config.qk_rope_head_dim
        # zeros, not empty: attention gives masked places weight 0, and 0 times NaN is NaN
        self.entries_LSMW = torch.zeros(
            config.num_hidden_layers, slots, length, width, dtype=weight.dtype, device=weight.device
        )

    @property
    def length(self) -> int:
        return self.entries_LSMW.shape[2]

    def fill(self, slots: Tensor, entries_LBTW: Tensor, rows: Tensor) -> None:
        """Copy prompt rows[i] into slots[i]."""
        self.entries_LSMW[:, slots, : entries_LBTW.shape[2]] = entries_LBTW.index_select(1, rows)

    def move(self, slots: Tensor, to: Tensor, length: int) -> None:
        """Copy the first `length` entries of `slots` to the slots `to`."""
        self.entries_LSMW[:, to, :length] = self.entries_LSMW[:, slots, :length]

    def grow(self, length: int) -> None:
        """Make room for sequences of up to `length` tokens."""
        layers, slots, held, width = self.entries_LSMW.shape
        more_LSMW = self.entries_LSMW.new_zeros(layers, slots, length - held, width)
        self.entries_LSMW = torch.cat([self.entries_LSMW, more_LSMW], dim=2)

    def shrink(self, slots: int) -> None:
        """Keep only the first `slots`."""
        self.entries_LSMW = self.entries_LSMW[:, :slots]


class Decoder:
    """Runs a model on the cache with torch's operators, on any device."""

    def __init__(self, model: DeepseekV3):
        self.model = model

    def slots_for(self, live: int, slots: int) -> int:
        """How many of `slots` to keep while `live` are unfinished."""
        return live

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Collects the experts [S, K] that `decode` chooses, layer by layer, while the context is open."""
        experts: list[Tensor] = []
        hooks = [
            gate.register_forward_hook(lambda gate, inputs, outputs: experts.append(outputs[1]))
            for gate in gates(self.model)
        ]
        try:
            yield experts
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Read prompts padded on the right -> cache entries_LBTW and the logits_BV after each last token."""
        entries: list[Tensor] = []
        hidden_BTD = self.model.model(tokens_BT, keep=entries.append)
        last_BD = hidden_BTD[torch.arange(len(lengths_B), device=lengths_B.device), lengths_B - 1]
        return torch.stack(entries), self.model.lm_head(last_BD)

    @torch.no_grad()
    def decode(self, tokens_S: Tensor, positions_S: Tensor, cache: LatentCache, length: int) -> Tensor:
        """Read one more token per slot, at `positions_S` -> logits_SV; the cache grows by these tokens.

        `length`, the part of the cache that is read, is larger than the position of every live slot. Finished
        slots may be beyond it; their logits are meaningless.
        """
        trunk = self.model.model
        rotation_Sr = trunk.rotary.table(tokens_S.device).index_select(0, positions_S)
        places_M = torch.arange(length, device=tokens_S.device)
        x_SD = trunk.embed_tokens(tokens_S)
        unseen_SM = torch.where(places_M <= positions_S.unsqueeze(1), 0.0, float("-inf")).to(x_SD.dtype)
        firsts_S = torch.arange(0, len(tokens_S) * cache.length, cache.length, device=tokens_S.device)
        for layer, entries_SMW in zip(trunk.layers, cache.entries_LSMW, strict=False):  # MTP layers come last
            x_SD = cast(DecoderLayer, layer).decode(
                x_SD, rotation_Sr, firsts_S + positions_S, entries_SMW, unseen_SM
            )
        return self.model.lm_head(trunk.norm(x_SD))
