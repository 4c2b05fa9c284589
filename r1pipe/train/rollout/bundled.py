"""The bundled sampler: continuous batching in this process, with the weights that are trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from r1pipe.core.types import Completion
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.rollout.drawing import SamplingParams
from r1pipe.train.rollout.sampler import Ended, Progress, Stop, Weights, never


@dataclass(eq=False)
class BundledSampler:
    """The Sampler that draws in this process, with the weights that are trained."""

    remote: ClassVar[bool] = False
    eos_ids: tuple[int, ...]
    pad_id: int
    graphs: bool = False  # decode through CUDA graphs
    weights: Weights | None = None  # after the first `update`
    version: int = 0

    def update(self, weights: Weights, version: int) -> None:
        """Nothing is copied: what is drawn comes from the weights as they are when it is drawn."""
        self.weights, self.version = weights, version

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        progress: Progress | None = None,
        ended: Ended | None = None,
        limits: Sequence[int] | None = None,
        stop: Stop = never,
    ) -> list[Completion]:
        """As Sampler's; all ranks call, which hold the whole model meanwhile."""
        assert self.weights is not None, "update first"
        with self.weights.gathered() as model:
            was_training = model.training
            model.eval()
            seqs = params.max_num_seqs
            batcher = Batcher(model, self.eos_ids, self.pad_id, seqs, self.graphs, stop)
            completions = batcher.generate(prompts, params, progress, ended, limits)
            model.train(was_training)
        return [replace(c, versions=((len(c.tokens), self.version),)) for c in completions]

    def close(self) -> None:
        """Nothing to do."""
