"""A model of transformers: its folder, and what r1pipe reads from the folder's files."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from r1pipe.config.engine import EngineConfig
from r1pipe.config.fields import Count, Positive, Rules, Strict
from r1pipe.config.lora import LoRAConfig, filled_lora, lora_rules
from r1pipe.config.stages import EvaluateConfig, PretrainConfig, StageConfig
from r1pipe.core import gguf
from r1pipe.core.errors import ConfigError
from r1pipe.core.safetensors import shapes_in

NAME = "hf"  # of conf/model/hf.yaml
DEEPSEEK = ("deepseek_v3", "deepseek_v2")  # model types that the bundled model computes
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass
class HFConfig(Strict):
    """A dense or MoE model of transformers, as policy, reference, student and trunk of a value model."""

    name: Literal["hf"]
    path: str  # folder in Hugging Face's format (safetensors, tokenizer, chat template), or a GGUF file
    attention: Literal["sdpa", "eager"]  # transformers' implementation
    max_position_embeddings: Positive  # longest sequence; null: that of the folder's config.json
    lora: LoRAConfig
    model_type: str  # read from config.json or the GGUF file's header, like all that follow
    vocab_size: Positive  # rows of the embedding
    hidden_size: Positive  # width of the residual stream
    intermediate_size: Positive  # width of the MLPs
    num_hidden_layers: Positive  # decoder layers
    num_experts: Count  # routed experts of a layer; 0: dense
    cache_width: Positive  # keys and values that a layer keeps of a token
    parameters: Positive  # number of weights in the files


def filled(model: dict[str, Any]) -> dict[str, Any]:
    """The values of conf/model/hf.yaml and the command line, with those of the folder.

    Raises ConfigError, one line, where the folder cannot be a model.
    """
    if not model.get("path"):
        raise ConfigError("model=hf needs model.path=DIR, a folder in Hugging Face's format, or a GGUF file")
    folder = Path(str(model["path"])).expanduser().resolve()
    packed = gguf.find(folder)
    path = packed or folder / "config.json"
    if packed:
        content, parameters = gguf.as_config(packed)
    else:
        content, parameters = _read(path, str(model["path"])), 0
    try:
        heads = content.get("num_key_value_heads") or content["num_attention_heads"]
        width = content.get("head_dim") or content["hidden_size"] // content["num_attention_heads"]
        most, why = longest_exact(content)
        facts = {key: content[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
        facts["intermediate_size"] = content.get("intermediate_size") or 4 * content["hidden_size"]
        facts["cache_width"] = 2 * heads * width
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} has no {error} of a decoder; give a causal language model") from None
    longest = model.get("max_position_embeddings") or content["max_position_embeddings"]
    if longest > most:
        raise ConfigError(
            f"model.max_position_embeddings={longest} is longer than {why}={most} of {path}; give "
            f"model.max_position_embeddings={most} or less"
        )
    experts = next((content[key] for key in EXPERTS if content.get(key)), 0)
    shapes = gguf.layer_shapes(packed) if packed else shapes_in(folder)
    more = {"model_type": content["model_type"], "num_experts": experts}
    more["parameters"] = parameters or sum(map(prod, shapes.values()))
    more["lora"] = filled_lora(model.get("lora"), shapes, str(packed or folder))
    return {**model, "path": str(packed or folder), "max_position_embeddings": longest, **facts, **more}


def _read(path: Path, named: str) -> dict[str, Any]:
    """The content of a config.json. Raises ConfigError where it is not that of a model of transformers."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.path={named} has no config.json; give a model's folder") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise ConfigError(f"{path} has no model_type; give a folder that transformers can load")
    if kind in DEEPSEEK:
        raise ConfigError(
            f"{path} is of model_type {kind}, which the bundled model computes: r1pipe import {path.parent}, "
            "then parent=FOLDER and the model of its shape"
        )
    return content


def longest_exact(content: dict[str, Any]) -> tuple[int, str]:
    """How many tokens a config.json lets a row have, and the key that says so.

    Beyond a sliding window or the context before LongRoPE, a token's states depend on more than the tokens
    before it in its document. Raises KeyError, TypeError.
    """
    limits = {"max_position_embeddings": content["max_position_embeddings"]}
    if content.get("use_sliding_window", True) and content.get("sliding_window"):
        limits["sliding_window"] = content["sliding_window"]
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        key = "original_max_position_embeddings"
        limits[key] = rope.get(key) or content[key]
    why = min(limits, key=lambda key: limits[key])
    return limits[why], why


def hf_rules(model: HFConfig, engine: EngineConfig, stage: StageConfig) -> Rules:
    """What only the bundled model can do; and the adapters' own rules."""
    yield from lora_rules(model.lora)
    if isinstance(stage, PretrainConfig):
        yield "model=hf starts from its own weights; stage=pretrain is for the bundled model (model=laptop)"
    if engine.precision == "fp8":
        yield "engine.precision=fp8 is for the bundled model; with model=hf give engine.precision=bf16"
    if engine.sampler_precision != "same":
        yield (
            f"{engine.sampler_precision=!s} is for the bundled model; with model=hf give "
            "engine.sampler_precision=same"
        )
    switches = dict.fromkeys(("graphs", "compile", "equal", "offload"), "false")
    plain = {**switches, "expert_parallel": "1", "pipeline": "1", "schedule": "1f1b"}
    for key, value in plain.items():
        wished = str(getattr(engine, key)).lower()
        if wished != value:
            yield f"engine.{key}={wished} is for the bundled model; with model=hf give engine.{key}={value}"
    if engine.attention == "flex":
        yield "engine.attention=flex is for the bundled model; with model=hf give engine.attention=sdpa"
    trains = not isinstance(stage, EvaluateConfig)
    if model.num_experts and trains and stage.router.balance_alpha:
        yield (
            f"{stage.router.balance_alpha=} is a loss of the bundled model's router; "
            "with model=hf give stage.router.balance_alpha=0"
        )
    if getattr(stage, "replay_routing", False):
        yield (
            "stage.replay_routing=true needs the bundled model's router; with model=hf give "
            "stage.replay_routing=false"
        )
    if getattr(stage, "routing_check_samples", 0) and model.num_experts:
        yield (
            "stage.routing_check_samples reads the bundled model's router; with model=hf give "
            "stage.routing_check_samples=0"
        )
