"""Settings of how a model computes: precision, recomputation, attention and compilation.

FP8 covers the products of V3 section 3.3.1: all projections of attention, dense layers, shared and routed
experts. Embedding, head, gate, norms, the core of attention and MTP's `eh_proj` keep the model's own type, as
in the published FP8 files.
"""

from typing import Any

import torch
from torch import Tensor, nn

from r1pipe.config import EngineConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.model.decoder_layer import DecoderLayer
from r1pipe.model.hf import HFTrunk
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.kernels.choice import choose
from r1pipe.model.kernels.fp8 import FP8, Quantisable
from r1pipe.model.kernels.training import Invariant
from r1pipe.model.layers import Linear
from r1pipe.model.logprobs import Head
from r1pipe.model.moe import MoE
from r1pipe.model.transformer import Trunk

VARIANTS = 64  # compiled versions of a layer: dense or MoE, with or without documents, past and loss


def train_as(model: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Apply the engine's config to a model that will be trained."""
    set_precision(model, config, device)
    set_recompute(model, config.recompute, config.offload)
    set_attention(model, config.attention)
    if config.compile:
        compile_layers(model)


def set_precision(model: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Round logits, and run a model's products in FP8, as the config says; its weights keep their type.

    Raises EnvironmentProblem if the requested backend cannot run on `device`.
    """
    for module in model.modules():
        if isinstance(module, Head):
            module.fp32 = config.head == "fp32"
    if config.precision == "fp8":
        backend = choose(config.kernels, device)
        compute_in(model, FP8(backend, config.fp8.power_of_two))


def compute_in(model: nn.Module, fp8: FP8 | None) -> None:
    """Run a model's products through `fp8`; None: in the model's own type."""
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
    """The model's FP8 settings; None if it does not compute in FP8."""
    return next((m.self_attn.o_proj.fp8 for m in model.modules() if isinstance(m, DecoderLayer)), None)


def set_batch_invariant(model: nn.Module, on: bool, dtype: torch.dtype = torch.float32) -> None:
    """Whether sampler and trainer compute the same bits (model/invariant.py), slower. For DeepseekV3.

    Raises EnvironmentProblem where the CPU kernels do not run.
    """
    if on and not (runs_here(torch.float32) and runs_here(dtype)):
        raise EnvironmentProblem(
            f"engine.equal=true needs the CPU kernels in {dtype}: a processor with AVX2 and FMA (bfloat16: "
            "AVX512_BF16) and a compiler; give engine.equal=false"
        )
    for module in model.modules():
        if isinstance(module, Invariant | Trunk):
            module.batch_invariant = on


def set_recompute(model: nn.Module, on: bool, offload: bool = False) -> None:
    for module in model.modules():
        if isinstance(module, Trunk):
            module.recompute, module.offload = on, offload
        elif isinstance(module, HFTrunk):
            module.set_recompute(on)


def set_attention(model: nn.Module, kind: str) -> None:
    """Choose "sdpa" or "flex" (see mla.py) in every trunk of a model."""
    for trunk in _trunks(model):
        trunk.flex = kind == "flex"


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile the decoder layers of a model, with torch.compile's `options`; it replaces recomputation.

    All layers go through one function, so that similar layers share compiled code. On a GPU there are no
    graph breaks.
    """
    run: Any = torch.compile(_run, **{"recompile_limit": VARIANTS, **options})
    for trunk in _trunks(model):
        trunk.compiled = run


def _run(layer: DecoderLayer, *arguments: Any) -> tuple[Tensor, ...]:
    return layer(*arguments)


def _trunks(model: nn.Module) -> list[Trunk]:
    return [module for module in model.modules() if isinstance(module, Trunk)]
