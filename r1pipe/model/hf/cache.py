"""Decoding a model of transformers with one token per slot, on keys and values in slots.

Axes as in layers.py; M is the cache's length, h the key-value heads, d their width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from r1pipe.model.hf.policy import HFModel

KeysValues = tuple[Tensor, Tensor]  # keys and values [., h, M, d] of a layer


class SlotCache:
    """Keys and values of `slots` sequences of up to `length` tokens, with LatentCache's methods."""

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self.layers: list[KeysValues] = []  # created by the first `fill`, which knows the shapes

    def fill(self, slots: Tensor, entries: list[KeysValues], rows: Tensor) -> None:
        """Copy prompt rows[i] of a prefill into slots[i]."""
        if not self.layers:  # zeros: attention gives masked places weight 0, and 0 times NaN is NaN
            self.layers = [
                (_zeros_like(keys, self.slots, self.length), _zeros_like(values, self.slots, self.length))
                for keys, values in entries
            ]
        for held, new in zip(self.layers, entries, strict=True):
            for into, read in zip(held, new, strict=True):
                into[slots, :, : read.shape[2]] = read.index_select(0, rows)

    def move(self, slots: Tensor, to: Tensor, length: int) -> None:
        """Copy the first `length` entries of `slots` to the slots `to`."""
        for held in self.layers:
            for part in held:
                part[to, :, :length] = part[slots, :, :length]

    def grow(self, length: int) -> None:
        more = length - self.length
        self.layers = [
            (
                torch.cat([keys, _zeros_like(keys, len(keys), more)], dim=2),
                torch.cat([values, _zeros_like(values, len(values), more)], dim=2),
            )
            for keys, values in self.layers
        ]
        self.length = length

    def widen(self, slots: int) -> None:
        more = slots - self.slots
        self.layers = [
            (
                torch.cat([keys, keys.new_zeros(more, *keys.shape[1:])]),
                torch.cat([values, values.new_zeros(more, *values.shape[1:])]),
            )
            for keys, values in self.layers
        ]
        self.slots = slots

    def shrink(self, slots: int) -> None:
        self.layers = [(keys[:slots], values[:slots]) for keys, values in self.layers]
        self.slots = slots


def _zeros_like(part: Tensor, slots: int, length: int) -> Tensor:
    return part.new_zeros(slots, part.shape[1], length, part.shape[3])


class _Slots(CacheLayerMixin):
    """One layer of a SlotCache as transformers' attention uses it in one step."""

    def __init__(self, held: KeysValues, positions_S: Tensor, length: int):
        super().__init__()
        self.held, self.positions_S, self.read = held, positions_S, length

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> KeysValues:
        """Write each slot's token at its position -> the keys and values to attend to, [S, h, length, d]."""
        places_S = torch.arange(len(self.positions_S), device=self.positions_S.device)
        for part, new in zip(self.held, (key_states, value_states), strict=True):
            part[places_S, :, self.positions_S] = new[:, :, 0]
        keys, values = self.held
        return keys[:, :, : self.read], values[:, :, : self.read]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The tensors exist."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.read, 0

    def get_seq_length(self) -> int:
        return self.read - 1

    def get_max_length(self) -> int:
        return self.held[0].shape[2]


class HFDecoder:
    """Decoder's interface for HFModel."""

    logprobs_of = None  # as the sampler's softmax sums

    def __init__(self, model: HFModel):
        self.model = model

    def slots_for(self, live: int, slots: int) -> int:
        """How many of `slots` to keep while `live` are unfinished."""
        return live

    def cache(self, slots: int, length: int) -> SlotCache:
        return SlotCache(slots, length)

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """No choice of experts is recorded: transformers' routers differ from family to family."""
        yield []

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[list[KeysValues], Tensor]:
        """Read prompts padded on the right -> keys and values by layer, and the logits_BV after each last
        token."""
        cache = DynamicCache()
        tokens = tokens_BT.shape[1]
        positions_BT = torch.arange(tokens, device=tokens_BT.device).expand_as(tokens_BT)
        seen_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=tokens_BT.device).tril_()
        seen_BTT = seen_TT.expand(len(tokens_BT), -1, -1)
        hidden_BTD = self.model.model.run(tokens_BT, positions_BT, seen_BTT, cache)
        last_BD = hidden_BTD[torch.arange(len(lengths_B), device=lengths_B.device), lengths_B - 1]
        return [(layer.keys, layer.values) for layer in cache.layers], self.model.lm_head(last_BD)

    @torch.no_grad()
    def decode(self, tokens_S: Tensor, positions_S: Tensor, cache: SlotCache, length: int) -> Tensor:
        """Read one more token per slot, at `positions_S` -> logits_SV; `length` as in Decoder."""
        places_M = torch.arange(length, device=tokens_S.device)
        seen_S1M = (places_M <= positions_S.unsqueeze(1)).unsqueeze(1)
        step = Cache(layers=[_Slots(held, positions_S, length) for held in cache.layers])
        hidden_S1D = self.model.model.run(tokens_S.unsqueeze(1), positions_S.unsqueeze(1), seen_S1M, step)
        return self.model.lm_head(hidden_S1D[:, 0])
