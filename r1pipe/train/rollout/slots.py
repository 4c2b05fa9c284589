"""Sequences that are decoded together, each in a slot of a batch with a cache.

Who fills the slots decides what a slot's number means; -1 marks a free one. A prompt is read once, and all of
its completions start from copies of its cache entries. Which slots have ended is known after every
CHECK_EVERY steps, so as not to wait for an accelerator at each token.

Axes: S slots, U completion tokens, B prompts of one prefill, V vocabulary, L MoE layers, K experts a token.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from r1pipe.config import ModelConfig

CHECK_EVERY = 2  # steps between checks of which slots have ended: an ended one idles for half of it
FREE = -1

# (slots, logits_SV, uniform_S) -> tokens_S and their log-probabilities
Draw = Callable[[np.ndarray, Tensor, Tensor], tuple[Tensor, Tensor]]


class Prefix(NamedTuple):
    """B prompts after one prefill."""

    entries: Any  # the decoder's
    logits_BV: Tensor
    experts: list[Tensor]  # of each prompt's last token, [B, K] for each MoE layer; empty: not recorded


class Start(NamedTuple):
    """A completion to begin."""

    number: int  # its slot's, not negative
    row: int  # of its prompt in the Prefix
    length: int  # tokens of the prompt
    limit: int  # tokens to draw at most
    uniforms: np.ndarray  # a random number per token, [U]


class Drawn(NamedTuple):
    """What a slot has drawn."""

    tokens: list[int]
    logprobs: list[float]
    experts: np.ndarray  # [tokens, L, K]; L = 0: not recorded


SLOT_TENSORS = (  # of Slots: a row per slot
    *("prompt_lengths_S", "limits_S", "counts_S", "tokens_S", "live_S"),
    *("drawn_SU", "logprobs_SU", "uniforms_SU", "experts_SULK"),
)


class Slots:
    """The state of a batch: what each slot has drawn, and the cache."""

    def __init__(
        self,
        decoder: Any,  # of decoder_of: its cache and entries are its own
        draw: Draw,
        stops: Collection[int],
        slots: int,
        length: int,
        longest: int,
        max_tokens: int,
        record_experts: bool = False,
    ):
        """`stops`: tokens that end a completion. The cache has room for `length` tokens of prompt and
        completion, and grows up to `longest`; a completion has at most `max_tokens`."""
        self.decoder, self.draw, self.longest = decoder, draw, longest
        config = decoder.model.config
        self.device = decoder.model.lm_head.weight.device
        self.cache = decoder.cache(slots, length)
        self.numbers = np.full(slots, FREE)
        self.prompt_lengths_S = self._zeros(slots) + 1  # a free slot is computed, too: at its first place
        self.limits_S = self._zeros(slots)  # tokens to draw at most
        self.counts_S = self._zeros(slots)  # tokens drawn
        self.tokens_S = self._zeros(slots)  # the last token drawn
        self.live_S = self._zeros(slots).bool()
        self.stops = stops
        self.ends_V = self._zeros(config.vocab_size).bool()
        self.ends_V[list(stops)] = True
        # one column more: a slot that has ended keeps writing there until the next check
        self.drawn_SU = self._zeros(slots, max_tokens + 1)
        self.logprobs_SU = self._zeros(slots, max_tokens + 1).float()
        self.uniforms_SU = self._zeros(slots, max_tokens + 1).float()
        choices = (0, 0)  # the recorded experts of a token, [L, K]
        if record_experts and isinstance(config, ModelConfig):
            choices = config.num_hidden_layers - config.first_k_dense_replace, config.num_experts_per_tok
        self.experts_SULK = self._zeros(slots, max_tokens + 1, *choices).to(torch.int16)

    def _recorded(self) -> AbstractContextManager[list[Tensor]]:
        """The list that a pass of the decoder fills with the experts of each MoE layer; it stays empty where
        none are recorded."""
        return self.decoder.recorded() if self.experts_SULK.shape[2] else nullcontext([])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.device)

    def free(self) -> np.ndarray:
        return np.flatnonzero(self.numbers == FREE)

    def taken(self) -> np.ndarray:
        return np.flatnonzero(self.numbers != FREE)

    def prefill(self, prompts: Sequence[list[int]], pad_id: int) -> Prefix:
        """Read prompts in one pass, padded to the longest."""
        longest = max(map(len, prompts))
        padded = [prompt + [pad_id] * (longest - len(prompt)) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        with self._recorded() as experts:
            entries, logits_BV = self.decoder.prefill(torch.tensor(padded, device=self.device), lengths)
        return Prefix(entries, logits_BV, experts)

    def start(self, slots: np.ndarray, starts: Sequence[Start], prefix: Prefix) -> None:
        """Begin completions in free slots; the prefill's logits give their first tokens. The cache must have
        room for their prompts."""
        where = torch.from_numpy(slots).to(self.device)
        rows = torch.tensor([start.row for start in starts], device=self.device)
        self.numbers[slots] = [start.number for start in starts]
        self.cache.fill(where, prefix.entries, rows)
        self.prompt_lengths_S[where] = torch.tensor([start.length for start in starts], device=self.device)
        self.limits_S[where] = torch.tensor([start.limit for start in starts], device=self.device)
        uniforms = np.zeros((len(starts), max(len(start.uniforms) for start in starts)), dtype=np.float32)
        for row, start in zip(uniforms, starts, strict=True):
            row[: len(start.uniforms)] = start.uniforms
        self.uniforms_SU[where, : uniforms.shape[1]] = torch.from_numpy(uniforms).to(self.device)
        self.counts_S[where] = 0
        self.live_S[where] = True
        logits_SV, experts = prefix.logits_BV.index_select(0, rows), [each[rows] for each in prefix.experts]
        self._record(where, *self.draw(slots, logits_SV, self.uniforms_SU[where, 0]), experts)

    def step(self) -> None:
        """Draw CHECK_EVERY tokens in every slot."""
        length = self._longest()
        if length + CHECK_EVERY > self.cache.length < self.longest:
            self.grow(2 * self.cache.length)
        for step in range(CHECK_EVERY):
            self._step(min(length + step, self.cache.length))

    def grow(self, length: int) -> None:
        """Make room for sequences of `length` tokens, or of `longest` if that is less."""
        if self.cache.length < min(length, self.longest):
            self.cache.grow(min(length, self.longest))

    def _longest(self) -> int:
        """How many cache entries the next step reads: the longest live sequence with its new token."""
        return int((self.prompt_lengths_S + self.counts_S).masked_fill(~self.live_S, 1).max())

    def _step(self, length: int) -> None:
        positions_S = self.prompt_lengths_S + self.counts_S - 1
        with self._recorded() as experts:
            logits_SV = self.decoder.decode(self.tokens_S, positions_S, self.cache, length)
        uniform_S = self.uniforms_SU.gather(1, self.counts_S.unsqueeze(1)).squeeze(1)
        slots = np.arange(len(self.numbers))
        self._record(slice(None), *self.draw(slots, logits_SV, uniform_S), experts)

    def _record(self, where: Tensor | slice, tokens: Tensor, logprobs: Tensor, experts: list[Tensor]) -> None:
        """Store the drawn tokens of the slots `where`, and the experts that each was drawn with; a slot that
        has ended writes beyond its end."""
        counts = self.counts_S[where]
        self.tokens_S[where] = tokens
        rows = torch.arange(len(self.numbers), device=self.device)[where]
        self.drawn_SU[rows, counts] = tokens
        self.logprobs_SU[rows, counts] = logprobs
        if experts:
            self.experts_SULK[rows, counts] = torch.stack(experts, dim=1).to(torch.int16)
        live = self.live_S[where]
        counts = counts + live
        live = live & (counts < self.limits_S[where])
        if self.stops:
            live = live & ~self.ends_V[tokens]
        self.counts_S[where] = counts
        self.live_S[where] = live

    def ended(self) -> np.ndarray:
        """The slots whose sequences have ended and are not released yet."""
        return np.flatnonzero((self.numbers != FREE) & ~self.live_S.cpu().numpy())

    def drawn(self, slots: np.ndarray, after: Sequence[int] | None = None) -> list[Drawn]:
        """What these slots have drawn; `after`: of each, without so many first tokens."""
        where = torch.from_numpy(slots).to(self.device)
        counts_S, after_S = self.counts_S[where], self._zeros(len(slots))
        if after is not None:
            after_S = torch.tensor(after, dtype=torch.long, device=self.device)
        counts = (counts_S - after_S).tolist()
        places_SU = after_S.unsqueeze(1) + torch.arange(max(counts, default=0), device=self.device)
        places_SU = places_SU.clamp_(max=self.drawn_SU.shape[1] - 1)
        rows_S1 = where.unsqueeze(1)
        drawn, logprobs, experts = (
            values[rows_S1, places_SU].cpu().numpy()
            for values in (self.drawn_SU, self.logprobs_SU, self.experts_SULK)
        )
        return [
            Drawn(drawn[row, :count].tolist(), logprobs[row, :count].tolist(), experts[row, :count])
            for row, count in enumerate(counts)
        ]

    def release(self, slots: np.ndarray) -> None:
        """Free slots, ended or not."""
        self.numbers[slots] = FREE
        self.live_S[torch.from_numpy(slots).to(self.device)] = False

    def widen(self, slots: int) -> None:
        """Add free slots, up to `slots` in all."""
        more = slots - len(self.numbers)
        self.numbers = np.concatenate([self.numbers, np.full(more, FREE)])
        self.cache.widen(slots)
        for name in SLOT_TENSORS:
            values = getattr(self, name)
            setattr(self, name, torch.cat([values, values.new_zeros(more, *values.shape[1:])]))
        self.prompt_lengths_S[-more:] = 1

    def shrink(self, slots: int) -> None:
        """Move the last taken slots into free ones at the front, and drop all but the first `slots`."""
        taken = self.taken()
        last = taken[taken >= slots]
        holes = np.flatnonzero(self.numbers[:slots] == FREE)[: len(last)]
        self.numbers[holes] = self.numbers[last]
        self.numbers = self.numbers[:slots]
        to, where = torch.from_numpy(holes).to(self.device), torch.from_numpy(last).to(self.device)
        self.cache.move(where, to, self._longest())
        self.cache.shrink(slots)
        for name in SLOT_TENSORS:
            values = getattr(self, name)
            values[to] = values[where]
            setattr(self, name, values[:slots])


def fitting(lengths: Sequence[int], most: int) -> int:
    """How many of these prompts, at least one, a pass of `most` padded tokens holds."""
    return max(1, sum(width * count <= most for count, width in enumerate(accumulate(lengths, max), 1)))
