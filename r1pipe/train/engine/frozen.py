"""A model that is only read, as a reference is: a copy on each rank or, at ZeRO level 3, one in shares."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.config import EngineConfig
from r1pipe.model import load_pretrained
from r1pipe.model.training import set_precision
from r1pipe.train.engine import patches
from r1pipe.train.engine.optimizer import deepspeed_config
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.sharded import load_sharded


class ClosureRunner(nn.Module):
    """Its forward runs any closure over the model, so that DeepSpeed's hooks see every pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, closure: Callable[[], Tensor]) -> Tensor:
        return closure()


@torch.no_grad()
def evaluate(
    ranks: Ranks, closures: Sequence[Callable[[], Tensor]], pipeline: Any, runner: Any
) -> list[Tensor]:
    """What each closure over a model returns; all ranks call, each with one or more of its own.

    `pipeline`: has the layers, if ranks share them out. `runner`: runs a pass that needs all ranks, which
    gather weights layer by layer, never the whole model; those with fewer closures repeat their last.
    """
    if pipeline:
        return pipeline.evaluate(closures)
    if runner is None:
        return [closure() for closure in closures]
    repeats = ranks.agree_max(len(closures)) - len(closures)
    return [runner(closure) for closure in [*closures, *[closures[-1]] * repeats]][: len(closures)]


class FrozenModel(Ranks):
    """`module` is the model; it is read through `evaluate`."""

    def __init__(self, model: nn.Module, config: EngineConfig):
        """`model` may be partitioned already (see sharded.py)."""
        super().__init__(config)
        self.start()
        self.config = config
        self.module: Any = model.to(self.device)
        if config.precision != "fp32":
            self.module = self.module.bfloat16()
        set_precision(self.module, config, self.device)
        self.module.eval().requires_grad_(False)
        self._runner: Any = None
        self._pipeline: Any = None
        if config.pipeline > 1:
            from r1pipe.train.engine.pipeline import Pipeline

            self._pipeline = Pipeline(self.module, config, self.device)
        if config.zero_level == 3:
            deepspeed = patches.start_deepspeed(self.device)
            share = patches.share_of(self.module, self.world_size)
            with self.patient():
                self._runner, *_ = deepspeed.initialize(
                    model=ClosureRunner(self.module),
                    config=deepspeed_config(config, 0.0, share),
                    dist_init_required=False,
                )

    def evaluate(self, closures: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """What each closure over `module` returns; all ranks call, each with one or more of its own."""
        return evaluate(self, closures, self._pipeline, self._runner)

    @torch.no_grad()
    def copy(self, other: nn.Module) -> None:
        """Take the weights of a model with the same names or more, partitioned alike; all ranks call."""
        theirs = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for name, mine in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if self._runner is None or not hasattr(mine, "ds_id"):
                if mine.numel():  # the layers of other ranks of a pipeline are empty
                    mine.copy_(theirs[name])
                continue
            with patches.whole([theirs[name]]), patches.whole([mine], changed_on=0):
                if self.rank == 0:
                    mine.copy_(theirs[name])

    def load(self, folder: Path) -> None:
        """Take the weights of a checkpoint of the same shape; all ranks call. Raises CheckpointError."""
        self.copy(load_pretrained(folder) if self._runner is None else load_sharded(folder, self.config))

    def gathered(self) -> AbstractContextManager[object]:
        """The whole model on every rank, for saving; all ranks must enter."""
        if self._pipeline:
            return self._pipeline.whole([*self.module.parameters()])
        return nullcontext() if self._runner is None else patches.whole([*self.module.parameters()])
