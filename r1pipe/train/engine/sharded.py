"""Load a model in shares over the ranks (ZeRO level 3): no rank ever has more than its share and one tensor.

Rank 0 reads tensor by tensor, or draws initial weights, and the others receive: DeepSpeed's `zero.Init`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from r1pipe.config import EngineConfig, ModelConfig
from r1pipe.model import DeepseekV3, Policy, weights
from r1pipe.model.hf import files
from r1pipe.model.names import published_parts
from r1pipe.model.policy import of_transformers
from r1pipe.model.reading import Stored, eos_ids
from r1pipe.runs import heartbeat
from r1pipe.train.engine import patches
from r1pipe.train.engine.optimizer import deepspeed_config
from r1pipe.train.engine.ranks import Ranks

Fill = Callable[[str, Tensor], None]  # writes the value of a weight or buffer, by its name


def load_sharded(
    folder: Path, config: EngineConfig, attention: str | None = None, longest: int | None = None
) -> Policy:
    """As load_pretrained, but in shares and in the engine's type; all ranks call. Raises CheckpointError."""
    if of_transformers(folder):
        settings = deepspeed_config(config, grad_clip=0.0)
        with _started(config).patient(), patches.transformers_partitions(settings):
            return files.load(folder, attention, longest, patches.running_in_shares)
    model, stored = weights.open_empty(folder)
    fill_in_shares(model, stored, config)
    model.eos_ids = eos_ids(folder)
    return model


def fill_in_shares(model: nn.Module, stored: Stored, config: EngineConfig) -> None:
    """Give a model of the bundled architecture, on the meta device, its checked tensors; all ranks call."""

    def read(name: str, tensor: Tensor) -> None:
        for published, part in published_parts(name, tensor):
            if published in stored.entries:
                part.copy_(stored.value(published))

    ranks = _started(config)
    _give_weights(model, ranks, config, read, weights.dtype_of(stored))
    _give_buffers(model, ranks, read)


def new_sharded(shape: ModelConfig, generator: torch.Generator, config: EngineConfig) -> DeepseekV3:
    """As DeepseekV3(shape, generator), but in shares; all ranks call."""
    with torch.device("meta"):
        model = DeepseekV3(shape)
    ranks, modules = _started(config), dict(model.named_modules())

    def draw(name: str, tensor: Tensor) -> None:
        model.draw(modules[name.rpartition(".")[0]], tensor, generator)

    _give_weights(model, ranks, config, draw, torch.float32)
    _give_buffers(model, ranks, lambda name, tensor: None)
    return model


def _started(config: EngineConfig) -> Ranks:
    ranks = Ranks(config)
    ranks.start()
    patches.start_deepspeed(ranks.device)
    return ranks


@torch.no_grad()
def _give_weights(
    model: nn.Module, ranks: Ranks, config: EngineConfig, fill: Fill, stored: torch.dtype
) -> None:
    """Replace the weights of a model on the meta device, in turn, each partitioned before the next is read.
    `fill` writes into tensors of the type `stored`, on rank 0 alone."""
    partition = patches.partitioner(deepspeed_config(config, grad_clip=0.0))
    dtype = torch.bfloat16 if config.precision != "fp32" else stored
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights are one
    with ranks.patient():
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter not in made:
                    whole = torch.empty(parameter.shape, dtype=stored)
                    if ranks.rank == 0:
                        fill(name, whole)
                    made[parameter] = nn.Parameter(whole.to(dtype))
                    with heartbeat.waiting(ranks.world_size > 1):
                        partition(made[parameter])
                setattr(module, name.rpartition(".")[2], made[parameter])


@torch.no_grad()
def _give_buffers(model: nn.Module, ranks: Ranks, fill: Fill) -> None:
    """Replace the buffers of a model on the meta device; every rank has them, zero where `fill` writes
    nothing."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            value = torch.zeros(buffer.shape, dtype=buffer.dtype)
            fill(name, value)
            setattr(module, name.rpartition(".")[2], value.to(ranks.device))
