"""Which products of a model run in FP8: those of V3 section 3.3.1.

All projections do: attention's, dense layers', shared and routed experts'. Embedding, head, gate, norms, the
core of attention, and what joins the halves of multi-token prediction stay in the model's own type, as in the
published FP8 files.
"""

import torch
from torch import nn

from r1pipe.config import EngineConfig
from r1pipe.model.decoder import DecoderLayer
from r1pipe.model.kernels.choice import choose
from r1pipe.model.kernels.fp8 import FP8, Quantisable
from r1pipe.model.layers import Linear
from r1pipe.model.moe import MoE


def set_precision(model: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Let a model's products run in FP8 where the config says so; the type of its weights stays.

    Raises EnvironmentProblem where the backend asked for cannot run on `device`.
    """
    if config.precision == "fp8":
        backend = choose(config.kernels, device)
        compute_in(model, FP8(backend, config.fp8.power_of_two, config.fp8.gradients))


def compute_in(model: nn.Module, fp8: FP8 | None) -> None:
    """Let a model's products run through `fp8`; None: in the model's own type."""
    for layer in model.modules():
        if not isinstance(layer, DecoderLayer):
            continue
        parts: list[tuple[str, Quantisable]] = [
            ("attention", module) for module in layer.self_attn.modules() if isinstance(module, Linear)
        ]
        if isinstance(layer.mlp, MoE):
            parts += [("experts", layer.mlp.experts), ("shared", layer.mlp.shared_experts)]
        else:
            parts.append(("dense", layer.mlp))
        for kind, module in parts:
            module.fp8, module.kind = fp8, kind


def fp8_of(model: nn.Module) -> FP8 | None:
    """How the model multiplies in FP8, where it does."""
    return next((m.self_attn.o_proj.fp8 for m in model.modules() if isinstance(m, DecoderLayer)), None)
