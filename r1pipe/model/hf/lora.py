"""Low-rank adapters (LoRA, arXiv 2106.09685) in a model of transformers, computed by PEFT's layers.

A layer W becomes W + alpha / rank * B A: A [rank, in] and B [out, rank] are trained, W is frozen, and B
starts at zero, so that training starts from the model itself. Weights leave this process merged, as that sum
in the type of W, under the names that they have without an adapter.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from r1pipe.config import LoRAConfig
from r1pipe.config.lora import is_target
from r1pipe.core.errors import CheckpointError, ConfigError, nearest
from r1pipe.model.hf.policy import HFModel
from r1pipe.runs.files import write_json

FOLDER = "adapter"  # of the adapter alone, in a checkpoint
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
ADAPTER = "default"  # PEFT's name of the only adapter of a model
PREFIX = "base_model.model."  # of names in PEFT's files
PARTS = ("lora_A", "lora_B")


def add(model: HFModel, config: LoRAConfig, seed: int) -> None:
    """Put adapters into the model's layers and freeze all else.

    A is drawn from `seed` alone. Raises ConfigError for a target that is no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.rank or 0,
        lora_alpha=config.scale,
        target_modules=_layers(model, config.targets),
        lora_dropout=0.0,  # nothing is random: the sampler is the trainer
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,  # a path would make two equal checkpoints differ
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global stream
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model.whole, ADAPTER)
    for layer in adapted(model).values():
        layer.to(layer.base_layer.weight.dtype)
    model.adapter = settings


def _layers(model: HFModel, targets: list[str] | None) -> list[str]:
    """Full names of the layers that get an adapter."""
    from transformers.pytorch_utils import Conv1D

    trunk = set(model.model.network.modules())  # not the head
    linear = [
        name
        for name, module in model.whole.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module in trunk
    ]
    for target in targets or []:
        if not any(is_target(name, [target]) for name in linear):
            known = {name.rpartition(".")[2] for name in linear}
            raise ConfigError(
                f"model.lora.targets: {target} is no linear layer of {type(model.whole).__name__}; "
                f"{nearest(target, known)}"
            )
    return [name for name in linear if targets is None or is_target(name, targets)]


def adapted(module: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name; none without adapters."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, PARTS[0])}


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The adapters' own weights, by PEFT's names without PREFIX; they share memory with the model's."""
    return {
        f"{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight
        for name, layer in adapted(module).items()
        for part in PARTS
    }


@contextmanager
def instead(module: nn.Module, other: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Compute with other weights in the adapters, as `weights` names them; None: without adapters.

    The weights must be whole, under ZeRO-3 gathered. Nothing of the model has changed afterwards.
    """
    if other is None:
        layers = adapted(module).values()
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
        return
    own = weights(module)
    kept = {name: weight.data for name, weight in own.items()}
    for name, weight in own.items():
        weight.data = other[name].to(weight)
    try:
        yield
    finally:
        for name, weight in own.items():
            weight.data = kept[name]


def without(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A state_dict's tensors but the adapters', by the names that they have without adapters."""
    for name, tensor in tensors.items():
        if not any(f".{part}." in name for part in PARTS):
            yield name.replace(".base_layer.", "."), tensor


@torch.no_grad()
def merged(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's tensors without adapters, by name, each layer's weight with its adapter added to it.

    One merged weight is made at a time; the others share memory with the model's.
    """
    layers = adapted(module)
    for name, tensor in without(module.state_dict()):
        layer = layers.get(name.removesuffix(".weight"))
        yield name, tensor if layer is None else merged_weight(layer)


def merged_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """One of the module's tensors, by its name without adapters, with its adapter added if it has one."""
    layer, suffix = name.removesuffix(".weight"), name.endswith(".weight")
    found: Any = module.get_submodule(layer) if suffix else None
    return merged_weight(found) if hasattr(found, PARTS[0]) else tensor


def merged_weight(layer: Any) -> Tensor:
    """W + alpha / rank * B A of one layer, computed in float32 and rounded once, to the type of W."""
    weight = layer.base_layer.weight
    first, second = (getattr(layer, part)[ADAPTER].weight.float() for part in PARTS)
    change = (second @ first) * layer.scaling[ADAPTER]
    return (weight.float() + (change.T if layer.fan_in_fan_out else change)).to(weight.dtype)


def save(model: HFModel, folder: Path) -> None:
    """Write the adapters alone into `folder`, as PEFT reads them."""
    assert model.adapter is not None
    write(model.adapter, weights(model.whole), folder)


def write(settings: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapters in PEFT's layout; `settings` is a LoraConfig, `tensors` are named as by `weights`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {key: sorted(v) if isinstance(v, set) else v for key, v in settings.to_dict().items()}
    write_json(folder / SETTINGS, content | {"inference_mode": True}, indent=2)
    permissions = (folder / SETTINGS).stat().st_mode  # by the umask; safetensors leaves mode 0600
    on_disk = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_disk, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(permissions)


def read(folder: Path) -> dict[str, Tensor]:
    """What `write` wrote, named as by `weights`. Raises CheckpointError where it is not there."""
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / WEIGHTS} is missing; restart the stage (--fresh)")
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
