"""The reference sampler: transformers' own `generate`, slow and plain, with the bundled sampler's draws.

A completion's random numbers, and the rule that turns one into a token, are those of drawing.py: with the
same logits both samplers draw the same completions. Axes: S rows of a batch, U tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

from r1pipe.core.types import Completion
from r1pipe.model import DeepseekV3, Policy
from r1pipe.model.names import published_config
from r1pipe.runs import heartbeat
from r1pipe.runs.stopping import Stopped
from r1pipe.train.rollout.checks import check_drawn, checked_limits, checked_stops
from r1pipe.train.rollout.drawing import SamplingParams, draw, uniform_stream
from r1pipe.train.rollout.sampler import Ended, Progress, Stop, Weights, never

CLASSES = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
}


class _Row(NamedTuple):
    """One completion to be drawn."""

    number: int  # prompt * n + sample
    prompt: list[int]
    limit: int  # most tokens


@dataclass(eq=False)
class TransformersSampler:
    """The Sampler that draws with transformers, in the model's type and on its device.

    A model of transformers draws where it is; of a bundled one `update` makes a copy in transformers' class.
    """

    remote: ClassVar[bool] = False
    eos_ids: tuple[int, ...]
    pad_id: int
    weights: Weights | None = None  # after the first `update`
    version: int = 0
    twin: Any = None  # the bundled model's

    def update(self, weights: Weights, version: int) -> None:
        self.weights, self.version = weights, version
        with weights.gathered() as policy:
            if isinstance(policy, DeepseekV3):
                self.twin = self.twin or twin_of(policy)
                missing = self.twin.load_state_dict(policy.state_dict(), strict=False).missing_keys
                assert not missing, missing

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        progress: Progress | None = None,
        ended: Ended | None = None,
        limits: Sequence[int] | None = None,
        stop: Stop = never,
    ) -> list[Completion]:
        """As Sampler's; `params.max_num_seqs` completions at a time, which wait for the longest of them."""
        assert self.weights is not None, "update first"
        found: list[Completion] = []
        numbers = range(len(prompts) * params.n)
        with self.weights.gathered() as policy:
            longest, vocabulary = policy.config.max_position_embeddings, policy.config.vocab_size
            each_limit = checked_limits(longest, vocabulary, prompts, params, limits)
            for first in range(0, len(numbers), params.max_num_seqs):
                chosen = numbers[first : first + params.max_num_seqs]
                rows = [
                    _Row(number, prompts[number // params.n], each_limit[number // params.n])
                    for number in chosen
                ]
                found += self._draw(policy, params, rows, ended, stop)
                if progress is not None:
                    progress(len(found), len(numbers))
        return found

    @torch.no_grad()
    def _draw(
        self, policy: Policy, params: SamplingParams, rows: list[_Row], ended: Ended | None, stop: Stop
    ) -> list[Completion]:
        """The completions of rows that are drawn together; prompts are padded on the left."""
        model = self.twin if isinstance(policy, DeepseekV3) else policy.whole
        device, width = model.device, max(len(row.prompt) for row in rows)
        padded_ST = torch.tensor([[self.pad_id] * (width - len(r.prompt)) + r.prompt for r in rows])
        read_ST = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in rows])
        stops = checked_stops(policy.config.vocab_size, params, self.eos_ids)
        draws = _Draw(_uniforms(params, rows).to(device), params)
        found: dict[int, Completion] = {}

        def on_end(place: int) -> None:
            tokens = [int(tokens_S[place]) for tokens_S in draws.tokens]
            logprobs = [logprobs_S[place].item() for logprobs_S in draws.logprobs]
            check_drawn(policy, rows[place].prompt, tokens, logprobs)
            completion = Completion(tokens, logprobs, "stop" if tokens[-1] in stops else "length")
            completion.versions = ((len(tokens), self.version),)
            found[place] = completion
            if ended is not None:
                ended(rows[place].number // params.n, completion)

        limits_S = torch.tensor([row.limit for row in rows], device=device)
        ends = _Ends(limits_S, torch.tensor([*stops], device=device), draws, on_end, stop)
        longest = max(row.limit for row in rows)
        config = GenerationConfig(do_sample=False, max_new_tokens=longest, pad_token_id=self.pad_id)
        with _plain(model):
            model.generate(
                padded_ST.to(device),
                attention_mask=read_ST.to(device),
                generation_config=config,
                logits_processor=[draws],
                stopping_criteria=[ends],
            )
        return [found[place] for place in range(len(rows))]

    def forget(self) -> None:
        self.weights = self.twin = None

    def close(self) -> None:
        self.forget()


def twin_of(model: DeepseekV3) -> Any:
    """transformers' model of the same shape, type and device; its weights are still to be filled in."""
    weight = model.lm_head.weight
    published = published_config(model.config, weight.dtype)
    config_class, model_class = CLASSES[published["model_type"]]
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global stream
        twin = model_class(config_class(**published))
    return twin.to(weight.dtype).to(weight.device).eval()


def _uniforms(params: SamplingParams, rows: Sequence[_Row]) -> Tensor:
    """uniforms_SU of completions, as the bundled sampler has them."""
    streams = []
    for row in rows:
        prompt, sample = divmod(row.number, params.n)
        index = params.first + prompt * params.stride
        streams.append(uniform_stream(params.seed, index, sample, params.max_tokens))
    return torch.from_numpy(np.stack(streams))


class _Draw(LogitsProcessor):
    """Draws each row's next token and leaves `generate` no other choice."""

    def __init__(self, uniforms_SU: Tensor, params: SamplingParams):
        self.uniforms_SU, self.params = uniforms_SU, params
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens_S, logprobs_S = draw(scores, self.uniforms_SU[:, len(self.tokens)], self.params)
        self.tokens.append(tokens_S)
        self.logprobs.append(logprobs_S)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens_S.unsqueeze(1), 0.0)


class _Ends(StoppingCriteria):
    """Ends rows at a stop token or at their limit, and tells of each as it ends."""

    def __init__(
        self, limits_S: Tensor, stops: Tensor, draws: _Draw, on_end: Callable[[int], None], stop: Stop
    ):
        self.limits_S, self.stops, self.draws = limits_S, stops, draws
        self.on_end, self.stop = on_end, stop
        self.done_S = torch.zeros_like(limits_S, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped_S = torch.isin(self.draws.tokens[-1], self.stops)
        ended_S = (stopped_S | (self.limits_S <= len(self.draws.tokens))) & ~self.done_S
        self.done_S |= ended_S
        for row in ended_S.nonzero().flatten().tolist():
            self.on_end(row)
        heartbeat.tick()
        if self.stop():
            raise Stopped
        return self.done_S


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Without what the model's own generation_config.json would add, and as for evaluation."""
    kept, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = kept
        model.train(was_training)
