"""A model that is only read, as a reference is: a copy on each rank, its share of layers and experts or, at
ZeRO level 3, of each weight."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.config import EngineConfig
from r1pipe.model.saving import write_pretrained
from r1pipe.model.training import set_precision
from r1pipe.train.engine import patches
from r1pipe.train.engine.gathered import Gathered
from r1pipe.train.engine.memory import share_of
from r1pipe.train.engine.optimizer import deepspeed_config
from r1pipe.train.engine.sharded import load_for_rank
from r1pipe.train.engine.writing import Writer


class ClosureRunner(nn.Module):
    """Its forward runs any closure over the model, so that DeepSpeed's hooks see every pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, closure: Callable[[], Tensor]) -> Tensor:
        return closure()


class FrozenModel(Gathered):
    """`module` is the model; it is read through `evaluate`."""

    def __init__(self, model: Any, config: EngineConfig):
        """`model` may be partitioned already (see sharded.py)."""
        super().__init__(config)
        self.start()
        self.config, self.zero_level = config, config.zero_level
        self.expert_parallel = 1 if self.zero_level == 3 else config.expert_parallel
        self.module = model.to(self.device)
        self._share_out(config, self.module)
        if config.precision != "fp32":
            self.module = self.module.bfloat16()
        set_precision(self.module, config, self.device)
        self.module.eval().requires_grad_(False)
        if config.pipeline > 1:
            from r1pipe.train.engine.pipeline import Pipeline

            self.pipeline = Pipeline(self.module, config, self)
        self._ds = _called
        if config.zero_level == 3:
            deepspeed = patches.start_deepspeed(self.device)
            share = share_of(self.module, self.world_size)
            with self.patient():
                self._ds, *_ = deepspeed.initialize(
                    model=ClosureRunner(self.module),
                    config=deepspeed_config(config, 0.0, share),
                    dist_init_required=False,
                )

    @torch.no_grad()
    def copy(self, other: nn.Module) -> None:
        """Take the weights of a model with the same names or more, partitioned alike; all ranks call."""
        theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for name, mine in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if not hasattr(mine, "ds_id"):
                if mine.numel():  # the layers of other ranks of a pipeline are empty
                    mine.copy_(theirs[name])
                continue
            with patches.whole([theirs[name]]), patches.whole([mine], changed_on=0):
                if self.rank == 0:
                    mine.copy_(theirs[name])

    def save(self, folder: Path, writer: Writer) -> None:
        """Write it as save_pretrained does; all ranks call, and none has it whole."""
        tensors = self.tensors()
        if self.rank == 0:
            writer.attempt(partial(write_pretrained, self.module, tensors, folder), folder)
        for _ in tensors:  # all gather, also what could not be written
            pass

    def load(self, folder: Path) -> None:
        """Take the weights of a checkpoint of the same shape; all ranks call. Raises CheckpointError."""
        self.copy(load_for_rank(folder, self.config, partial(self._share_out, self.config)))


def _called(closure: Callable[[], Tensor]) -> Tensor:
    return closure()
