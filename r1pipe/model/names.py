"""The published format: names of tensors, and config.json, converted to and from ours.

Sources: DeepSeek-V3's published config.json and weight files, and transformers' variant of them.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1pipe.config import ModelConfig, RopeScaling
from r1pipe.config.fields import build
from r1pipe.config.model import check_model
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.model.kernels.reference import TILE
from r1pipe.model.mtp import stored_copies
from r1pipe.model.transformer import DeepseekV3
from r1pipe.runs.files import read_object

CONFIG = "config.json"
BIAS = "e_score_correction_bias"  # always float32
FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "use_cache": True,
}
QUANTIZATION = {  # weights in E4M3 with a float32 scale for each block (V3 section 3.3)
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [TILE, TILE],
}
MODEL_TYPES = ("deepseek_v3", "deepseek_v2")
# a layer's experts with gate, up and down apart, as Mixtral's reference names them: expert parallelism
SEPARATE = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# transformers leaves these out of what it saves, because V3 has no other
V3_ONLY = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def published_tensors(model: DeepseekV3) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under the published names; experts are views into the fused parameters."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield from published_parts(name, tensor)


def published_parts(name: str, tensor: Tensor, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the model under its published name or, if it holds experts of a layer, names. Where gate,
    up and down are apart they may be some experts alone, from number `first` on."""
    if name.endswith("experts.gate_up_proj"):
        for expert, (gate, up) in enumerate(t.chunk(2) for t in tensor):
            yield name.replace("gate_up_proj", f"{expert}.gate_proj.weight"), gate
            yield name.replace("gate_up_proj", f"{expert}.up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        for expert, down in enumerate(tensor):
            yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
    elif (part := name.rpartition(".experts.")[2]) in SEPARATE:
        for expert, weight in enumerate(tensor, first):
            yield f"{name.removesuffix(part)}{expert}.{SEPARATE[part]}.weight", weight
    else:
        yield name, tensor


def layer_of(name: str) -> int:
    """The decoder layer that a tensor belongs to; -1 for the others."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2:3] and parts[2].isdigit() else -1


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, with the copies for multi-token prediction."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in published_tensors(DeepseekV3(config))}
    return shapes | {copy: shapes[name] for copy, name in stored_copies(config).items()}


def published_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as DeepSeek publishes it; vLLM needs `topk_method` and `scoring_func`."""
    v3 = config.topk_method == "noaux_tc"
    fields = dataclasses.asdict(config)
    del fields["name"]
    return {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "num_key_value_heads": config.num_attention_heads,
        **FIXED,
        **fields,
    }


def model_config_from(folder: Path | str) -> ModelConfig:
    """The config in a checkpoint's config.json. It may have MTP layers that are not stored.

    Raises CheckpointError naming the file and the key.
    """
    path = Path(folder) / CONFIG
    content = read_object(path)
    if content.get("model_type", MODEL_TYPES[0]) not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type={content['model_type']} is none of {', '.join(MODEL_TYPES)}; other models "
            f"are used where they are: model=hf model.path={folder}"
        )
    quantization = content.get("quantization_config", QUANTIZATION)
    for key, value in QUANTIZATION.items():
        if not isinstance(quantization, dict) or quantization.get(key, value) != value:
            raise CheckpointError(f"{path}: quantization_config must have {key} {value}")
    for key, fixed in FIXED.items():
        if key in content and content[key] != fixed and key != "use_cache":
            raise CheckpointError(f"{path}: {key}={content[key]} is not supported; it must be {fixed}")
    content = _as_published(content) | {"name": Path(folder).resolve().name}
    content["num_nextn_predict_layers"] = content.get("num_nextn_predict_layers") or 0  # absent, or null
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    missing = [name for name in names if name not in content]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}; only DeepSeek-V2 and V3 shapes can be loaded"
        )
    try:
        config = build(ModelConfig, {name: content[name] for name in names}, "")
        check_model(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config


def _as_published(content: dict[str, Any]) -> dict[str, Any]:
    """config.json in DeepSeek's format, converted from transformers' (`rope_parameters`)."""
    content = {"tie_word_embeddings": False, "rope_scaling": None, **content}
    if content.get("model_type") == MODEL_TYPES[0]:
        content = {**V3_ONLY, **content}
    rope = content.get("rope_parameters")
    if isinstance(rope, dict):
        content["rope_theta"] = rope.get("rope_theta", content.get("rope_theta"))
        content["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    scaling = content["rope_scaling"]
    if isinstance(scaling, dict):
        kind = scaling.get("type", scaling.get("rope_type"))
        keys = (field.name for field in dataclasses.fields(RopeScaling))
        content["rope_scaling"] = {key: scaling[key] for key in keys if key in scaling} | {"type": kind}
    return content
