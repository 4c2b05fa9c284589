"""Low-rank adapters on a model of transformers: which layers get one, and how large that is."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from r1pipe.config.fields import AboveZero, Count, Positive, Rules, Strict, shown
from r1pipe.core.errors import ConfigError, nearest

# A tensor's name -> the layer's: of a numbered decoder layer, hence neither embedding nor head.
LINEAR = re.compile(r"(.+\.\d+\..+)\.weight")
EXPERTS = re.compile(r"\.experts\.")  # transformers computes them in one product, from one tensor
ROUTER = re.compile(r"\.(gate|router)$")


@dataclass
class LoRAConfig(Strict):
    """Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT; with them no other weight is trained."""

    rank: Count | None  # width of each adapter; null or 0: no adapters, all weights are trained
    alpha: AboveZero | None  # adapters are scaled by alpha / rank; null: twice the rank
    targets: list[str] | None  # ends of layers' names, as q_proj; null: all linear layers but the head
    parameters: Positive | None  # number of weights of the adapters, from the folder; null: no adapters

    @property
    def scale(self) -> float:
        """alpha, with PEFT's type where it is whole."""
        alpha = self.alpha or 2 * (self.rank or 0)
        return int(alpha) if alpha == int(alpha) else alpha


def filled_lora(lora: Any, shapes: Mapping[str, tuple[int, ...]], folder: str) -> Any:
    """The values of `model.lora` with the number of its weights, by the `shapes` of the folder's tensors.

    Raises ConfigError where a target is no layer of that model.
    """
    if not isinstance(lora, dict):
        return lora  # `build` says what it must be
    rank, targets = lora.get("rank"), lora.get("targets")
    if type(rank) is not int or rank < 1 or not (targets is None or is_names(targets)):
        return {**lora, "parameters": None}
    adapted = adapted_layers(shapes, targets, folder)
    return {**lora, "parameters": sum(rank * sum(shape) for shape in adapted) or None}


def is_names(targets: Any) -> bool:
    return isinstance(targets, list) and all(isinstance(target, str) for target in targets)


def adapted_layers(
    shapes: Mapping[str, tuple[int, ...]], targets: list[str] | None, folder: str
) -> list[tuple[int, ...]]:
    """The shapes of the layers that get an adapter. Raises ConfigError for a target that is no such layer."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and LINEAR.fullmatch(name)}
    layers = {name.removesuffix(".weight"): shape for name, shape in matrices.items()}
    linear = {name: shape for name, shape in layers.items() if not EXPERTS.search(name)}
    if targets is None:
        return [shape for name, shape in linear.items() if not ROUTER.search(name)]
    for target in targets:
        if any(is_target(name, [target]) for name in linear):
            continue
        if any(is_target(name, [target]) for name in layers):
            raise ConfigError(
                f"model.lora.targets: {target} is a layer of experts in {folder}, where adapters do not "
                "reach; give others"
            )
        known = {name.rpartition(".")[2] for name in linear}
        raise ConfigError(
            f"model.lora.targets: {target} is no linear layer of {folder}; {nearest(target, known)}"
        )
    return [shape for name, shape in linear.items() if is_target(name, targets)]


def is_target(layer: str, targets: Iterable[str]) -> bool:
    """Whether a layer's name ends with one of the targets, in whole parts; PEFT's rule."""
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def lora_rules(lora: LoRAConfig) -> Rules:
    if lora.targets == []:
        yield "model.lora.targets=[] leaves nothing to train; give names of layers, or null for all"
    if not lora.rank:
        for key in ("alpha", "targets"):
            if (value := getattr(lora, key)) is not None:
                yield f"model.lora.{key}={shown(value)} needs model.lora.rank=NUMBER, as 16"
    elif lora.parameters is None:
        yield "model.lora.rank: the model has no linear layer in its decoder layers; drop it"
