"""Continuous batching on a cache with slots.

Up to `max_num_seqs` sequences (vLLM's name) are decoded together, each in a slot of the batch. A prompt is
read once and its n completions start from copies of its cache entries; a slot whose completion has ended
takes the next one; at the end, the batch shrinks. Which slots have ended is checked every CHECK_EVERY steps,
so as not to wait for an accelerator at each token.

Axes: S slots, U completion tokens, B prompts of one prefill, V vocabulary, L MoE layers, K experts a token.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from r1pipe.config import ModelConfig
from r1pipe.core.errors import ConfigError
from r1pipe.core.types import Completion
from r1pipe.model import Policy
from r1pipe.model.policy import decoder_of
from r1pipe.model.training import fp8_of
from r1pipe.runs import heartbeat
from r1pipe.runs.stopping import Stopped
from r1pipe.train.rollout.checks import check_drawn, checked_limits, checked_stops
from r1pipe.train.rollout.drawing import SamplingParams, draw, uniform_stream
from r1pipe.train.rollout.sampler import Ended, Progress, Stop, never

CHECK_EVERY = 2  # steps between checks of which slots have ended: an ended one idles for half of it
PREFILL_TOKENS = 2048  # padded prompt tokens per prefill on a CPU: fits a core's cache
PREFILL_TOKENS_GPU = 16384
CACHE_TOKENS = 256  # with `limits`: initial room for answers, doubled as they grow


@dataclass(eq=False)
class Batcher:
    """Draws completions from a model, in its own type and on its own device."""

    model: Policy
    eos_id: int | tuple[int, ...] | None = None  # None: those of generation_config.json, if any
    pad_id: int = 0  # pads prompts, without effect
    max_num_seqs: int = 256
    graphs: bool = False  # decode through CUDA graphs; `generate` raises ConfigError where that is impossible
    stop: Stop = never  # `generate` raises Stopped as soon as it is true

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"sampling: max_num_seqs={self.max_num_seqs} must be at least 1")

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        progress: Progress | None = None,
        ended: Ended | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """n completions per prompt, prompt by prompt in order; `text` stays empty.

        A completion's random numbers depend on (seed, its prompt's global index, its own index) alone.
        `progress` gets (done, total) completions, `ended` each finished completion with its prompt's index.
        `limits`: the most tokens of each prompt's completions, up to max_tokens; the cache then grows with
        the answers. Raises ConfigError if a prompt or a stop token is impossible for the model.
        """
        shape = self.model.config
        longest, vocabulary = shape.max_position_embeddings, shape.vocab_size
        each_limit = checked_limits(longest, vocabulary, prompts, params, limits)
        if not prompts:
            return []
        fp8 = fp8_of(self.model)
        with fp8.held() if fp8 else nullcontext():
            return _Batch(self, prompts, params, ended, each_limit, grows=limits is not None).run(progress)


class _Prefix(NamedTuple):
    """Prompts [first, first + B) after one prefill."""

    first: int
    entries: Any  # the decoder's
    logits_BV: Tensor
    experts: list[Tensor]  # of each prompt's last token, [B, K] for each MoE layer; empty: not recorded


SLOT_TENSORS = (  # of _Batch: a row per slot
    *("prompt_lengths_S", "limits_S", "counts_S", "tokens_S", "live_S"),
    *("drawn_SU", "logprobs_SU", "uniforms_SU", "experts_SULK"),
)


class _Batch:
    """The state of one `generate`. A completion's number is prompt * n + sample; -1 marks a free slot."""

    def __init__(
        self,
        sampler: Batcher,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        ended: Ended | None,
        limits: list[int],
        grows: bool,
    ):
        self.sampler, self.prompts, self.params = sampler, prompts, params
        self.ended, self.limits = ended, limits
        self.device = sampler.model.lm_head.weight.device
        ends = sampler.model.eos_ids if sampler.eos_id is None else sampler.eos_id
        ends = (ends,) if isinstance(ends, int) else ends
        self.stops = checked_stops(sampler.model.config.vocab_size, params, ends)
        self.total = len(prompts) * params.n
        self.started = 0
        self.results: list[Completion | None] = [None] * self.total
        self.prefix: _Prefix | None = None
        slots = min(sampler.max_num_seqs, self.total)
        longest_prompt = max(len(prompt) for prompt in prompts)
        self.decoder: Any = decoder_of(sampler.model, sampler.graphs)  # its cache and entries are its own
        self.logprobs_of = self.decoder.logprobs_of
        self.longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        first = min(self.longest, longest_prompt + CACHE_TOKENS) if grows else self.longest
        self.cache = self.decoder.cache(slots, first)
        self.numbers = np.full(slots, -1)
        self.prompt_lengths_S = self._zeros(slots)
        self.limits_S = self._zeros(slots)  # tokens to draw at most
        self.counts_S = self._zeros(slots)  # tokens drawn
        self.tokens_S = self._zeros(slots)  # the last token drawn
        self.live_S = self._zeros(slots).bool()
        self.ends_V = self._zeros(sampler.model.config.vocab_size).bool()
        self.ends_V[list(self.stops)] = True
        # one column more: a slot that has ended keeps writing there until the next check
        self.drawn_SU = self._zeros(slots, params.max_tokens + 1)
        self.logprobs_SU = self._zeros(slots, params.max_tokens + 1).float()
        self.uniforms_SU = self._zeros(slots, params.max_tokens + 1).float()
        self.experts_SULK = self._zeros(slots, params.max_tokens + 1, *self._choices()).to(torch.int16)

    def _choices(self) -> tuple[int, int]:
        """The recorded experts of a token, [L, K]; [0, 0] where there are none to record."""
        config = self.sampler.model.config
        if not self.params.record_experts or not isinstance(config, ModelConfig):
            return 0, 0
        return config.num_hidden_layers - config.first_k_dense_replace, config.num_experts_per_tok

    def _recorded(self) -> AbstractContextManager[list[Tensor]]:
        """The list that a pass of the decoder fills with the experts of each MoE layer; it stays empty where
        none are recorded."""
        return self.decoder.recorded() if self.experts_SULK.shape[2] else nullcontext([])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.device)

    @torch.inference_mode()  # a tenth less time per small operation than no_grad
    def run(self, progress: Progress | None) -> list[Completion]:
        done = 0
        while done < self.total:
            self._refill()
            length = self._longest()
            if length + CHECK_EVERY > self.cache.length < self.longest:
                self.cache.grow(min(2 * self.cache.length, self.longest))
            for step in range(CHECK_EVERY):
                self._step(min(length + step, self.cache.length))
            heartbeat.tick()
            if self.sampler.stop():
                raise Stopped
            ended = self._collect()
            done += ended
            if ended and progress is not None:
                progress(done, self.total)
            if self.started == self.total:
                self._shrink()
        return [result for result in self.results if result is not None]

    def _refill(self) -> None:
        """Start the next completions in the free slots; the prefill's logits give their first tokens."""
        free = np.flatnonzero(self.numbers < 0)
        while len(free) and self.started < self.total:
            prompt, n = self.started // self.params.n, self.params.n
            if self.prefix is None or prompt >= self.prefix.first + len(self.prefix.logits_BV):
                self.prefix = self._prefill(prompt)
            end = (self.prefix.first + len(self.prefix.logits_BV)) * n
            slots, free = np.split(free, [min(len(free), end - self.started)])
            numbers = np.arange(self.started, self.started + len(slots))
            self._start(slots, numbers, self.prefix)
            self.started += len(slots)

    def _prefill(self, first: int) -> _Prefix:
        """Read prompts from `first` on: as many as the slots can use and one forward pass should hold."""
        most = PREFILL_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS_GPU
        chunk = self.prompts[first : first + -(-len(self.numbers) // self.params.n)]
        widths = accumulate(map(len, chunk), max)
        fitting = sum(width * count <= most for count, width in enumerate(widths, 1))
        chunk = chunk[: max(1, fitting)]
        longest = max(len(prompt) for prompt in chunk)
        padded = [prompt + [self.sampler.pad_id] * (longest - len(prompt)) for prompt in chunk]
        lengths = torch.tensor([len(prompt) for prompt in chunk], device=self.device)
        with self._recorded() as experts:
            entries, logits_BV = self.decoder.prefill(torch.tensor(padded, device=self.device), lengths)
        return _Prefix(first, entries, logits_BV, experts)

    def _start(self, slots: np.ndarray, numbers: np.ndarray, prefix: _Prefix) -> None:
        params = self.params
        prompts, samples = np.divmod(numbers, params.n)
        where = torch.from_numpy(slots).to(self.device)
        rows = torch.from_numpy(prompts - prefix.first).to(self.device)
        streams = [
            uniform_stream(params.seed, params.first + int(p) * params.stride, int(s), params.max_tokens)
            for p, s in zip(prompts, samples, strict=True)
        ]
        self.numbers[slots] = numbers
        self.cache.fill(where, prefix.entries, rows)
        lengths, limits = [len(self.prompts[p]) for p in prompts], [self.limits[p] for p in prompts]
        self.prompt_lengths_S[where] = torch.tensor(lengths, device=self.device)
        self.limits_S[where] = torch.tensor(limits, device=self.device)
        self.uniforms_SU[where, :-1] = torch.from_numpy(np.stack(streams)).to(self.device)
        self.counts_S[where] = 0
        self.live_S[where] = True
        logits_SV, experts = prefix.logits_BV.index_select(0, rows), [each[rows] for each in prefix.experts]
        self._record(where, *draw(logits_SV, self.uniforms_SU[where, 0], params, self.logprobs_of), experts)

    def _longest(self) -> int:
        """How many cache entries the next step reads: the longest live sequence with its new token."""
        return int((self.prompt_lengths_S + self.counts_S).masked_fill(~self.live_S, 1).max())

    def _step(self, length: int) -> None:
        positions_S = self.prompt_lengths_S + self.counts_S - 1
        with self._recorded() as experts:
            logits_SV = self.decoder.decode(self.tokens_S, positions_S, self.cache, length)
        uniform_S = self.uniforms_SU.gather(1, self.counts_S.unsqueeze(1)).squeeze(1)
        self._record(slice(None), *draw(logits_SV, uniform_S, self.params, self.logprobs_of), experts)

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

    def _collect(self) -> int:
        """Turn ended slots into completions and free them; returns how many."""
        ended = np.flatnonzero((self.numbers >= 0) & ~self.live_S.cpu().numpy())
        if not len(ended):
            return 0
        where = torch.from_numpy(ended).to(self.device)
        counts = self.counts_S[where].tolist()
        drawn, logprobs = self.drawn_SU[where].cpu().numpy(), self.logprobs_SU[where].cpu().numpy()
        experts = self.experts_SULK[where].cpu().numpy()
        for row, (number, count) in enumerate(zip(self.numbers[ended], counts, strict=True)):
            tokens, of_tokens = drawn[row, :count].tolist(), logprobs[row, :count].tolist()
            prompt = self.prompts[number // self.params.n]
            check_drawn(self.sampler.model, prompt, tokens, of_tokens)
            reason = "stop" if tokens[-1] in self.stops else "length"
            completion = Completion(tokens, of_tokens, reason)
            if self.experts_SULK.shape[2]:
                completion.experts = experts[row, :count].copy()
            self.results[number] = completion
            if self.ended is not None:
                self.ended(int(number) // self.params.n, completion)
        self.numbers[ended] = -1
        return len(ended)

    def _shrink(self) -> None:
        """Move the last live slots into free ones at the front, and drop the rest of the batch."""
        live = np.flatnonzero(self.numbers >= 0)
        if not len(live):
            return
        slots = self.decoder.slots_for(len(live), len(self.numbers))
        if slots == len(self.numbers):
            return
        last = live[live >= slots]
        holes = np.flatnonzero(self.numbers[:slots] < 0)[: len(last)]
        self.numbers[holes] = self.numbers[last]
        self.numbers = self.numbers[:slots]
        to, where = torch.from_numpy(holes).to(self.device), torch.from_numpy(last).to(self.device)
        self.cache.move(where, to, self._longest())
        self.cache.shrink(slots)
        for name in SLOT_TENSORS:
            values = getattr(self, name)
            values[to] = values[where]
            setattr(self, name, values[:slots])
