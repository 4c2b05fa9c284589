"""Checkpoints: safetensors under the published per-expert names, and config.json in the published format.

Nothing is ever unpickled. Whatever does not fit is a CheckpointError of one line that names file and tensor.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r1pipe.config.schema import ModelConfig, RopeScaling
from r1pipe.errors import CheckpointError
from r1pipe.model.moe import reset_loads
from r1pipe.model.mtp import stored_copies
from r1pipe.model.transformer import DeepseekV3

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "use_cache": True,
}


def published_tensors(model: DeepseekV3) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under the published names; experts come as views into the fused parameters."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                yield name.replace("gate_up_proj", f"{expert}.gate_proj.weight"), gate
                yield name.replace("gate_up_proj", f"{expert}.up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
        elif not (tied and name == "lm_head.weight"):
            yield name, tensor


def published_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as DeepSeek publishes it; `topk_method` and `scoring_func` are what vLLM asks for."""
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


def save_pretrained(model: DeepseekV3, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors (above 5 GB: shards and an index) into `folder`.

    `dtype` casts the weights (None: as they are); the router bias stays float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in published_tensors(model):
        kept = dtype is None or name.endswith("e_score_correction_bias")
        tensors[name] = (tensor if kept else tensor.to(dtype)).detach().cpu().contiguous()
    tensors |= {copy: tensors[name].clone() for copy, name in stored_copies(model.config).items()}
    stored = tensors["model.embed_tokens.weight"].dtype
    plan = split_torch_state_dict_into_shards(tensors)
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    text = json.dumps(published_config(model.config, stored), indent=2)
    (folder / CONFIG).write_text(text + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a checkpoint folder?") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _fields(kind: type, content: dict[str, Any], path: Path) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    missing = [name for name in names if name not in content]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}; only DeepSeek-V2 and V3 shapes can be loaded"
        )
    return {name: content[name] for name in names}


def model_config_from(folder: Path | str) -> ModelConfig:
    """The shape written in a checkpoint's config.json."""
    path = Path(folder) / CONFIG
    content = _read_json(path)
    if "quantization_config" in content:
        raise CheckpointError(f"{path} has quantization_config; convert the weights to bfloat16 first")
    for key, value in FIXED.items():
        if key in content and content[key] != value and key != "use_cache":
            raise CheckpointError(f"{path}: {key}={content[key]} is not supported, only {value}")
    content = {"name": Path(folder).name, "tie_word_embeddings": False, "rope_scaling": None, **content}
    content["num_nextn_predict_layers"] = content.get("num_nextn_predict_layers") or 0
    values = _fields(ModelConfig, content, path)
    if values["rope_scaling"] is not None:
        if not isinstance(values["rope_scaling"], dict):
            raise CheckpointError(f"{path}: rope_scaling must be an object or null")
        values["rope_scaling"] = RopeScaling(**_fields(RopeScaling, values["rope_scaling"], path))
    return ModelConfig(**values)


def _locate(folder: Path) -> dict[str, Path]:
    """Every stored tensor's name and the file it lies in, checked against the index where there is one."""
    index = folder / INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} lacks weight_map; copy the checkpoint again")
        return {name: folder / filename for name, filename in weight_map.items()}
    path = folder / WEIGHTS
    with _opened(path) as stored:
        return dict.fromkeys(stored.keys(), path)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the checkpoint again") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}); copy the checkpoint again") from None


def _is_mtp(name: str, config: ModelConfig) -> bool:
    parts = name.split(".")
    return (
        parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) >= config.num_hidden_layers
    )


@torch.no_grad()
def load_pretrained(folder: Path | str) -> DeepseekV3:
    """The model of a checkpoint folder, on the CPU, in the stored type.

    Raises CheckpointError for anything missing, extra, of a wrong shape, or unreadable.
    """
    folder = Path(folder)
    config, where = model_config_from(folder), _locate(folder)
    if not any(_is_mtp(name, config) for name in where):  # named, but not stored: transformers leaves it out
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    copies = stored_copies(config)
    where = {name: path for name, path in where.items() if name not in copies}
    with torch.device("meta"):
        model = DeepseekV3(config)
    shapes = {name: tensor.shape for name, tensor in published_tensors(model)}
    for name in sorted(shapes.keys() - where.keys()):
        raise CheckpointError(f"{folder}: tensor {name} is missing; the weights do not fit {CONFIG}")
    for name in sorted(where.keys() - shapes.keys()):
        raise CheckpointError(
            f"{where[name]}: tensor {name} has no place in the model that {CONFIG} describes"
        )
    files = {path: _opened(path) for path in sorted(set(where.values()))}
    dtype = _stored(files, where, "model.embed_tokens.weight").dtype
    model = model.to_empty(device="cpu").to(dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, place in published_tensors(model):
        tensor = _stored(files, where, name)
        if tensor.shape != place.shape:
            raise CheckpointError(
                f"{where[name]}: tensor {name} has shape {list(tensor.shape)},"
                f" {CONFIG} asks for {list(place.shape)}"
            )
        place.copy_(tensor)
    reset_loads(model)
    return model


def _stored(files: dict[Path, Any], where: dict[str, Path], name: str) -> Tensor:
    try:
        return files[where[name]].get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{where[name]}: tensor {name} cannot be read ({error})") from None
