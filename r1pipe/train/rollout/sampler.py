"""What every sampler does: prompts in, completions out, from the weights of the last update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from r1pipe.core.types import Completion
from r1pipe.model import Policy
from r1pipe.model.buckets import buckets_of
from r1pipe.train.rollout.drawing import SamplingParams

Progress = Callable[[int, int], None]
Ended = Callable[[int, Completion], None]
Stop = Callable[[], object]


def never() -> bool:
    """A Stop that asks for nothing."""
    return False


class Ranks(Protocol):
    """The ranks of a job (r1pipe.train.engine.ranks.Ranks)."""

    rank: int
    world_size: int
    device: torch.device

    def all_gather_objects(self, value: Any) -> list[Any]: ...


class Weights(Protocol):
    """A policy's weights, which ranks may share: the engine's, or a whole model's."""

    def gathered(self) -> AbstractContextManager[Policy]:
        """The whole model on every rank; all ranks must enter."""

    def buckets(self, most_bytes: int) -> Iterator[dict[str, Tensor]]:
        """The tensors by published name, layer by layer, at most about `most_bytes` at a time; all ranks must
        read to the end. A tensor is valid until the next bucket."""


@dataclass
class WholeWeights:
    """The Weights of a model that is whole on every rank: nothing is sharded."""

    model: Policy

    @contextmanager
    def gathered(self) -> Iterator[Policy]:
        yield self.model

    def buckets(self, most_bytes: int) -> Iterator[dict[str, Tensor]]:
        return buckets_of(self.model, most_bytes)


class Sampler(Protocol):
    """Draws completions from the weights of the last `update`; engine.sampler says which one."""

    # Draws in another process: `generate` may run in threads, several at a time, while this process trains
    # and calls `update`. What is under way then goes on with the new weights (Completion.versions).
    remote: ClassVar[bool]

    def update(self, weights: Weights, version: int) -> None:
        """Draw from `weights` from now on; `version` is the step that made them. All ranks call."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        progress: Progress | None = None,
        ended: Ended | None = None,
        limits: Sequence[int] | None = None,
        stop: Stop = never,
    ) -> list[Completion]:
        """n completions per prompt, prompt by prompt in order; `text` stays empty. All ranks call, with
        prompts of their own or none.

        `progress` gets (done, total) completions, `ended` each finished completion with its prompt's index.
        `limits`: the most tokens of each prompt's completions, up to max_tokens. Raises Stopped as soon as
        `stop` is true, and ConfigError if a prompt or a stop token is impossible for the model.
        """

    def forget(self) -> None:
        """Let go of the weights, to free their memory; `update` comes before anything is drawn again."""

    def close(self) -> None:
        """Free what the sampler holds; it cannot be used afterwards."""
