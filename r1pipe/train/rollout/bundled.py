"""The bundled sampler: continuous batching in this process, with the weights that are trained or a copy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from r1pipe.config import EngineConfig
from r1pipe.core.types import Completion
from r1pipe.model import DeepseekV3, Policy
from r1pipe.model.kernels.choice import choose
from r1pipe.model.kernels.fp8 import FP8
from r1pipe.model.layers import give_memory
from r1pipe.model.training import compute_in
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.rollout.drawing import SamplingParams
from r1pipe.train.rollout.sampler import Ended, Progress, Stop, Weights, never


class Copy:
    """The policy in the precision of engine.sampler_precision; its master weights stay with the trainer.

    In fp8 the copy is in bfloat16, and its projections multiply as with engine.precision=fp8: on a CPU both
    operands are quantised and dequantised.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.model: DeepseekV3 | None = None  # made by the first `of`

    @torch.no_grad()
    def of(self, policy: DeepseekV3) -> DeepseekV3:
        """The copy with the policy's weights of now. Raises EnvironmentProblem where FP8 cannot run."""
        if self.model is None:
            self.model = self._made(policy)
        weights = policy.state_dict()
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        return self.model

    def _made(self, policy: DeepseekV3) -> DeepseekV3:
        device = policy.lm_head.weight.device
        with torch.device("meta"):
            model = DeepseekV3(replace(policy.config, num_nextn_predict_layers=0))
        model = give_memory(model.bfloat16(), device)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        if self.config.sampler_precision == "fp8":
            compute_in(model, FP8(choose(self.config.kernels, device), self.config.fp8.power_of_two))
        return model.requires_grad_(False)


@dataclass(eq=False)
class BundledSampler:
    """The Sampler that draws in this process, with the weights that are trained."""

    remote: ClassVar[bool] = False
    eos_ids: tuple[int, ...]
    pad_id: int
    graphs: bool = False  # decode through CUDA graphs
    copy: Copy | None = None  # draw with a copy in another precision
    weights: Weights | None = None  # after the first `update`
    version: int = 0

    def update(self, weights: Weights, version: int) -> None:
        """Nothing is copied yet: what is drawn comes from the weights as they are when it is drawn."""
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
            batcher = Batcher(self._drawn_from(model), self.eos_ids, self.pad_id, seqs, self.graphs, stop)
            completions = batcher.generate(prompts, params, progress, ended, limits)
            model.train(was_training)
        if self.copy is not None and self.copy.config.zero_level == 3:  # whole, beside sharded weights
            self.copy.model = None
        return [replace(c, versions=((len(c.tokens), self.version),)) for c in completions]

    def _drawn_from(self, model: Policy) -> Policy:
        if self.copy is None or not isinstance(model, DeepseekV3):  # the config's rules refuse others
            return model
        return self.copy.of(model).eval()

    def forget(self) -> None:
        self.weights = None
        if self.copy:
            self.copy.model = None

    def close(self) -> None:
        self.forget()
