"""Continuous batching of prompts that are all there from the beginning.

Up to `max_num_seqs` sequences (vLLM's name) are decoded together, each in a slot (slots.py). A slot whose
completion has ended takes the next one; at the end, the batch shrinks.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from r1pipe.train.rollout.slots import Draw, Prefix, Slots, Start, fitting

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


class _Batch:
    """The state of one `generate`. A completion's number is prompt * n + sample."""

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
        model = sampler.model
        ends = model.eos_ids if sampler.eos_id is None else sampler.eos_id
        ends = (ends,) if isinstance(ends, int) else ends
        self.stops = checked_stops(model.config.vocab_size, params, ends)
        self.total = len(prompts) * params.n
        self.started = 0
        self.results: list[Completion | None] = [None] * self.total
        self.prefix: Prefix | None = None
        self.first = 0  # the prefix holds the prompts from this one on
        self.decoder = decoder_of(model, sampler.graphs)
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        first = min(longest, max(map(len, prompts)) + CACHE_TOKENS) if grows else longest
        slots = min(sampler.max_num_seqs, self.total)
        size = slots, first, longest, params.max_tokens
        drawing = _drawing(params, self.decoder)
        self.slots = Slots(self.decoder, drawing, self.stops, *size, params.record_experts)

    @torch.inference_mode()  # a tenth less time per small operation than no_grad
    def run(self, progress: Progress | None) -> list[Completion]:
        done = 0
        while done < self.total:
            self._refill()
            self.slots.step()
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
        """Start the next completions in the free slots."""
        free = self.slots.free()
        while len(free) and self.started < self.total:
            prompt, n = self.started // self.params.n, self.params.n
            if self.prefix is None or prompt >= self.first + len(self.prefix.logits_BV):
                self.prefix, self.first = self._prefill(prompt), prompt
            end = (self.first + len(self.prefix.logits_BV)) * n
            slots, free = np.split(free, [min(len(free), end - self.started)])
            numbers = range(self.started, self.started + len(slots))
            self.slots.start(slots, [self._start(number) for number in numbers], self.prefix)
            self.started += len(slots)

    def _prefill(self, first: int) -> Prefix:
        """Read prompts from `first` on: as many as the slots can use and one forward pass should hold."""
        most = PREFILL_TOKENS if self.slots.device.type == "cpu" else PREFILL_TOKENS_GPU
        chunk = self.prompts[first : first + -(-len(self.slots.numbers) // self.params.n)]
        chunk = chunk[: fitting([len(prompt) for prompt in chunk], most)]
        return self.slots.prefill(chunk, self.sampler.pad_id)

    def _start(self, number: int) -> Start:
        params = self.params
        prompt, sample = divmod(number, params.n)
        stream = uniform_stream(params.seed, params.first + prompt * params.stride, sample, params.max_tokens)
        return Start(number, prompt - self.first, len(self.prompts[prompt]), self.limits[prompt], stream)

    def _collect(self) -> int:
        """Turn ended slots into completions and free them; returns how many."""
        ended = self.slots.ended()
        if not len(ended):
            return 0
        for number, drawn in zip(self.slots.numbers[ended].tolist(), self.slots.drawn(ended), strict=True):
            prompt = number // self.params.n
            check_drawn(self.sampler.model, self.prompts[prompt], drawn.tokens, drawn.logprobs)
            reason = "stop" if drawn.tokens[-1] in self.stops else "length"
            completion = Completion(drawn.tokens, drawn.logprobs, reason)
            if drawn.experts.shape[1]:
                completion.experts = drawn.experts.copy()
            self.results[number] = completion
            if self.ended is not None:
                self.ended(prompt, completion)
        self.slots.release(ended)
        return len(ended)

    def _shrink(self) -> None:
        """Drop slots that nothing is left for."""
        live = len(self.slots.taken())
        if not live:
            return
        slots = self.decoder.slots_for(live, len(self.slots.numbers))
        if slots < len(self.slots.numbers):
            self.slots.shrink(slots)


def _drawing(params: SamplingParams, decoder: Any) -> Draw:
    """How slots draw. It does not refer to the batch: batch and slots would be a cycle, and Python would free
    their cache only when it next looks for cycles, several rollouts later."""

    def draw_in(slots: np.ndarray, logits_SV: Tensor, uniform_S: Tensor) -> tuple[Tensor, Tensor]:
        return draw(logits_SV, uniform_S, params, decoder.logprobs_of)

    return draw_in
