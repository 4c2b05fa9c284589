"""A model that the ranks of an engine share, read by all together, or made whole for sampling and saving."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from r1pipe.config import EngineConfig
from r1pipe.model.buckets import buckets_of
from r1pipe.model.saving import BUCKET
from r1pipe.runs import heartbeat
from r1pipe.train.engine import patches
from r1pipe.train.engine.memory import elements
from r1pipe.train.engine.optimizer import is_shared_out
from r1pipe.train.engine.ranks import Ranks


class Gathered(Ranks):
    """The part of an engine that reads a model that its ranks share out: weights, experts, layers."""

    module: Any
    zero_level: int
    expert_parallel: int
    pipeline: Any = None  # a Pipeline, where ranks share out layers
    _ds: Any  # DeepSpeed's engine

    @property
    def _experts(self) -> Any:
        """The module expert_parallel, which imports DeepSpeed."""
        from r1pipe.train.engine import expert_parallel

        return expert_parallel

    def _share_out(self, config: EngineConfig, model: Any) -> None:
        """Leave this rank its share of a model's experts, where ranks share them out."""
        if self.expert_parallel > 1:
            self._experts.share_out(model, config, self)

    @property
    def in_step(self) -> bool:
        """Whether every pass needs all ranks, as they exchange weights or tokens within it."""
        return self.zero_level == 3 or self.expert_parallel > 1 or self.pipeline is not None

    @torch.no_grad()
    def evaluate(self, closures: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """What each closure over the model returns, without gradients; all ranks call, each with one or more
        of its own.

        Where every pass needs all ranks, weights are gathered layer by layer, never the whole model, and
        ranks with fewer closures repeat their last.
        """
        if self.pipeline:
            return self.pipeline.evaluate(closures)
        if not self.in_step:
            return [closure() for closure in closures]
        repeats = self.agree_max(len(closures)) - len(closures)
        found = [self._ds(closure) for closure in [*closures, *[closures[-1]] * repeats]][: len(closures)]
        if self.zero_level == 3:
            patches.release_prefetched(self._ds)
        return found

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        """The whole model on every rank, for sampling, evaluation and saving; all ranks must enter."""
        with ExitStack() as stack:
            stack.enter_context(self._unpartitioned([*self.module.parameters()]))
            if self.zero_level == 3:
                stack.enter_context(patches.without_zero3_hooks(self._ds))
            if self.expert_parallel > 1:
                self._enter(stack, self._experts.whole(self.module))
            yield self.module

    def buckets(self, most_bytes: int) -> Iterator[dict[str, Tensor]]:
        """As Weights' (see buckets_of); every rank gets them, and all must read to the end.

        No rank has more than a bucket, or one of the model's tensors, beside its shard of the weights.
        """
        yield from buckets_of(self.module, most_bytes, self._made_whole, self._elements)

    def _elements(self, tensor: Tensor) -> int:
        """Of the whole tensor."""
        own = self.pipeline.elements(tensor) if self.pipeline else elements(tensor)
        return own * (self.expert_parallel if is_shared_out(tensor) else 1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by published name, for saving; every rank gets them, and all must read to the end."""
        gathers = self.in_step  # what is gathered goes with its bucket
        for bucket in self.buckets(BUCKET):
            for name, tensor in bucket.items():
                yield name, tensor.detach().to("cpu", copy=True) if gathers else tensor

    @contextmanager
    def _made_whole(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """The parameters among the tensors on every rank; all ranks must enter."""
        with ExitStack() as stack:
            stack.enter_context(self._unpartitioned(tensors))
            if self.expert_parallel > 1:
                self._enter(stack, self._experts.made_whole(tensors))
            yield

    @contextmanager
    def _unpartitioned(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """What ZeRO-3 has partitioned of the tensors, and what other ranks of a pipeline have of them; with
        expert parallelism, a rank's own experts alone."""
        with ExitStack() as stack:
            if self.zero_level == 3:
                self._enter(stack, patches.whole(tensors))
            if self.pipeline:
                self._enter(stack, self.pipeline.whole(tensors))
            yield

    def _enter(self, stack: ExitStack, block: AbstractContextManager[object]) -> None:
        """Enter a block that begins with collectives of training."""
        self.barrier()  # rank 0 may have hashed the last checkpoint
        with heartbeat.waiting(self.world_size > 1):
            stack.enter_context(block)
