"""Run folders for jobs that the tests really run: a tiny model on the bundled world."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from r1pipe.config import to_mapping
from r1pipe.config.compose import compose
from r1pipe.config.schema import EngineConfig, OptimConfig, RouterConfig, RunConfig
from r1pipe.model import DeepseekV3
from r1pipe.provenance import write_json

TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.moe_intermediate_size=16",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.kv_lora_rank=16",
    "model.max_position_embeddings=384",
    "engine.ranks=1",
    "engine.threads=1",
    "stage.eval.problems=4",
    "stage.eval.shown=2",
    "stage.eval.samples=1",
    "stage.eval.general=5",
    "stage.eval.max_tokens=8",
]
OPTIM = OptimConfig(1e-2, 1e-3, "linear", 2, [0.9, 0.95], 1e-8, 0.1, 1.0)
ROUTER = RouterConfig(bias_rate=0.01, balance_alpha=0.0)


@cache
def tiny(stage: str, *overrides: str) -> RunConfig:
    return compose([f"stage={stage}", *TINY, *overrides]).config


def engine_config(ranks: int = 1, zero_level: int = 0, precision: str = "fp32") -> EngineConfig:
    return replace(tiny("pretrain").engine, ranks=ranks, zero_level=zero_level, precision=precision)


def tiny_model() -> DeepseekV3:
    return DeepseekV3(tiny("pretrain").model, torch.Generator().manual_seed(0))


def write_run(folder: Path, config: RunConfig) -> Path:
    """A run folder with its config.json, as `r1pipe run` leaves it for the job."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_mapping(config))
    return folder
