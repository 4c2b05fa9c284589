"""How the passes that train a model are computed; the others (sampling, scoring) stay as they are."""

from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.config import EngineConfig
from r1pipe.model.decoder import DecoderLayer
from r1pipe.model.precision import set_precision
from r1pipe.model.transformer import Trunk

VARIANTS = 64  # of a compiled layer: dense or MoE, with or without documents, past and loss, first shapes


def train_as(model: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Train a model as the config of the engine says."""
    set_precision(model, config, device)
    set_recompute(model, config.recompute)
    set_attention(model, config.attention)
    if config.compile:
        compile_layers(model)


def set_recompute(model: nn.Module, on: bool) -> None:
    """Turn activation recomputation on or off in every trunk of a model."""
    for trunk in _trunks(model):
        trunk.recompute = on


def set_attention(model: nn.Module, kind: str) -> None:
    """Choose "sdpa" or "flex" (see flex.py) in every trunk of a model."""
    for trunk in _trunks(model):
        trunk.flex = kind == "flex"


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile the decoder layers of a model, with torch.compile's `options`; it replaces recomputation.

    All are one function of a layer, so that like layers share what was compiled. Nothing in them breaks the
    graph, on a GPU.
    """
    run: Any = torch.compile(_run, **{"recompile_limit": VARIANTS, **options})
    for trunk in _trunks(model):
        trunk.compiled = run


def _run(layer: DecoderLayer, *arguments: Any) -> Tensor:
    return layer(*arguments)


def _trunks(model: nn.Module) -> list[Trunk]:
    return [module for module in model.modules() if isinstance(module, Trunk)]
