"""Load a model sharded over the ranks (ZeRO level 3): no rank ever has more than its shard and one tensor.

Rank 0 reads tensor by tensor, or draws initial weights, and the others receive: DeepSpeed's `zero.Init`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1pipe.config import EngineConfig, ModelConfig
from r1pipe.model import DeepseekV3, Policy, weights
from r1pipe.model.buckets import buckets_of
from r1pipe.model.hf import files
from r1pipe.model.names import published_parts
from r1pipe.model.policy import load_pretrained, of_transformers
from r1pipe.model.reading import Stored, eos_ids
from r1pipe.runs import heartbeat
from r1pipe.train.engine import patches
from r1pipe.train.engine.memory import elements, return_freed_memory
from r1pipe.train.engine.optimizer import deepspeed_config
from r1pipe.train.engine.pipeline_groups import groups_of, owner_of
from r1pipe.train.engine.ranks import Ranks

Fill = Callable[[str, Tensor], None]  # writes the value of a weight or buffer, by its name
Parts = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
Prepare = Callable[[Policy], None]
Made = dict[nn.Parameter, nn.Parameter]  # old -> new: tied weights are one


def as_it_is(model: Policy) -> None:
    """A Prepare that changes nothing."""


def load_sharded(
    folder: Path,
    config: EngineConfig,
    attention: str | None = None,
    longest: int | None = None,
    prepare: Prepare = as_it_is,
) -> Policy:
    """As load_pretrained, but sharded and in the engine's type; all ranks call. Raises CheckpointError.

    `prepare` gets a model of the bundled architecture before its weights: it freezes layers, or leaves each
    rank some experts.
    """
    if of_transformers(folder):
        settings = deepspeed_config(config, grad_clip=0.0)
        with _started(config).patient(), patches.transformers_partitions(settings):
            return files.load(folder, attention, longest, running_sharded)
    model, stored = weights.open_empty(folder)
    prepare(model)
    fill_sharded(model, stored, config)
    model.eos_ids = eos_ids(folder)
    return model


def load_layers(folder: Path, config: EngineConfig, prepare: Prepare = as_it_is) -> DeepseekV3:
    """As load_pretrained, but each rank reads its layers of a pipeline; the weights of others are empty.

    All ranks call. `prepare` as in load_sharded. Raises CheckpointError.
    """
    from r1pipe.train.engine.expert_parallel import ParallelExperts  # imports DeepSpeed

    model, stored = weights.open_empty(folder)
    ranks, layers = _started(config), model.config.num_hidden_layers
    prepare(model)
    position, made = groups_of(config.pipeline).position, Made()
    for prefix, module in model.named_modules():
        first = module.first if isinstance(module, ParallelExperts) else 0

        def read(name: str, parameter: nn.Parameter, first: int = first) -> nn.Parameter:
            own = owner_of(name, layers, config) == position
            tensor = torch.empty(parameter.shape if own else 0, dtype=weights.dtype_of(stored))
            if own:
                _read(stored, name, tensor, partial(published_parts, first=first))
            new = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            vars(new).update(vars(parameter))  # marks of shared experts
            return new

        _replace(module, prefix, made, read)
    _give_buffers(model, ranks, partial(_read, stored))
    model.eos_ids = eos_ids(folder)
    return model


def load_for_rank(
    folder: Path,
    config: EngineConfig,
    prepare: Prepare = as_it_is,
    attention: str | None = None,
    longest: int | None = None,
) -> Policy:
    """As load_pretrained, but what a rank of an engine has of it; all ranks call. `prepare` as in
    load_sharded. Raises CheckpointError."""
    if config.zero_level == 3:
        return load_sharded(folder, config, attention, longest, prepare)
    if config.pipeline > 1:
        return load_layers(folder, config, prepare)
    model = load_pretrained(folder, attention, longest)
    prepare(model)
    return model


def _read(stored: Stored, name: str, tensor: Tensor, parts: Parts = published_parts) -> None:
    """Fill in a tensor of a model from the files, where it is in them."""
    for published, part in parts(name, tensor):
        if published in stored.entries:
            part.copy_(stored.value(published))


@dataclass
class ShardedWeights:
    """The Weights (see rollout.Sampler) of a sharded model that is not trained; all ranks call."""

    model: Policy

    @contextmanager
    def gathered(self) -> Iterator[Policy]:
        """The whole model on every rank."""
        with ExitStack() as stack:
            with heartbeat.waiting():
                stack.enter_context(patches.whole([*self.model.parameters()]))
            yield self.model

    def buckets(self, most_bytes: int) -> Iterator[dict[str, Tensor]]:
        """No rank has more than a bucket, or one of the model's tensors, beside its shard of the weights."""
        return buckets_of(self.model, most_bytes, patches.whole, elements)


def fill_sharded(
    model: nn.Module, stored: Stored, config: EngineConfig, parts: Parts = published_parts
) -> None:
    """Give a model, whose weights are on the meta device, its checked tensors; all ranks call. `parts` of a
    tensor by their names in the files."""

    read, ranks = partial(_read, stored, parts=parts), _started(config)
    _give_weights(model, ranks, config, read, weights.dtype_of(stored))
    _give_buffers(model, ranks, read)


def new_sharded(
    shape: ModelConfig, generator: torch.Generator, config: EngineConfig, prepare: Prepare = as_it_is
) -> DeepseekV3:
    """As DeepseekV3(shape, generator), but sharded; all ranks call. `prepare` as in load_sharded."""
    with torch.device("meta"):
        model = DeepseekV3(shape)
    ranks, modules = _started(config), dict(model.named_modules())
    prepare(model)

    def draw(name: str, tensor: Tensor) -> None:
        model.draw(modules[name.rpartition(".")[0]], tensor, generator)

    _give_weights(model, ranks, config, draw, torch.float32)
    _give_buffers(model, ranks, lambda name, tensor: None)
    return model


def _started(config: EngineConfig) -> Ranks:
    ranks = Ranks(config)
    ranks.start()
    patches.start_deepspeed(ranks.device)
    return_freed_memory()
    return ranks


@torch.no_grad()
def _give_weights(
    model: nn.Module, ranks: Ranks, config: EngineConfig, fill: Fill, stored: torch.dtype
) -> None:
    """Replace the weights of a model on the meta device, in turn, each partitioned before the next is read.
    `fill` writes into tensors of the type `stored`, on rank 0 alone. Of experts that ranks share out, each
    takes its own, which DeepSpeed partitions later."""
    from r1pipe.train.engine.expert_parallel import ParallelExperts, ParallelMoE  # imports DeepSpeed

    partition = patches.partitioner(deepspeed_config(config, grad_clip=0.0))
    dtype = torch.bfloat16 if config.precision != "fp32" else torch.float32
    made = Made()

    def read(name: str, shape: torch.Size) -> Tensor:
        """On rank 0; elsewhere the values mean nothing."""
        tensor = torch.empty(shape, dtype=stored)
        if ranks.rank == 0:
            fill(name, tensor)
        return tensor.to(dtype)

    def receive(layer: str, name: str, shape: torch.Size) -> Tensor:
        tensor = read(layer + name, shape).to(ranks.device)
        with heartbeat.waiting(ranks.world_size > 1):
            dist.broadcast(tensor, 0)
        return tensor

    def share(name: str, parameter: nn.Parameter) -> nn.Parameter:
        shared = nn.Parameter(read(name, parameter.shape), requires_grad=parameter.requires_grad)
        with heartbeat.waiting(ranks.world_size > 1):
            partition(shared)
        return shared

    with ranks.patient():
        for prefix, module in [*model.named_modules()]:
            if isinstance(module, ParallelMoE):
                module.fill(partial(receive, f"{prefix}.experts."))
            if not isinstance(module, ParallelExperts):
                _replace(module, prefix, made, share)


def _replace(
    module: nn.Module, prefix: str, made: Made, make: Callable[[str, nn.Parameter], nn.Parameter]
) -> None:
    """Give a module, which the model knows as `prefix`, other parameters of its own (not its children's)."""
    for name, parameter in module.named_parameters(prefix, recurse=False):
        if parameter not in made:
            made[parameter] = make(name, parameter)
        setattr(module, name.rpartition(".")[2], made[parameter])


@torch.no_grad()
def _give_buffers(model: nn.Module, ranks: Ranks, fill: Fill) -> None:
    """Put a model's buffers on the ranks' device; those on the meta device are zero where `fill` writes
    nothing."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            value = torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer
            fill(name, value)
            setattr(module, name.rpartition(".")[2], value.to(ranks.device))


@contextmanager
def running_sharded(model: nn.Module) -> Iterator[None]:
    """A block in which a partitioned model that no engine has yet can run: each module's own weights are
    whole while it does. All ranks must run the same."""
    blocks: list[AbstractContextManager[None]] = []

    def gather(module: nn.Module, inputs: Any) -> None:
        blocks.append(patches.whole([*module.parameters(recurse=False)]))
        blocks[-1].__enter__()

    def release(module: nn.Module, inputs: Any, output: Any) -> None:
        blocks.pop().__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(gather))
            handles.append(module.register_forward_hook(release))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
