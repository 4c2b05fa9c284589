"""Checkpoints: load and save a model, and take a checkpoint from one precision or cut to another.

A folder holds safetensors under the published per-expert names and config.json in the published format.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1pipe.config import ModelConfig
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.model.kernels.reference import quantise_blocks
from r1pipe.model.moe import reset_loads
from r1pipe.model.mtp import stored_copies
from r1pipe.model.names import (
    BIAS,
    CONFIG,
    QUANTIZATION,
    layer_of,
    model_config_from,
    published_config,
    published_shapes,
    published_tensors,
)
from r1pipe.model.reading import PLAIN, SCALE, Stored, check
from r1pipe.model.transformer import DeepseekV3
from r1pipe.model.writing import SHARD_BYTES, write_shards
from r1pipe.runs.files import read_object, write_json

GENERATION = "generation_config.json"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def save_pretrained(
    model: DeepseekV3, folder: Path | str, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json and model.safetensors (above `shard_bytes`: shards and an index) into `folder`.

    `dtype` casts the weights (None: as they are); the router bias stays float32.
    """
    folder = Path(folder)
    write_shards(_to_store(model, dtype), folder, shard_bytes)
    content = published_config(model.config, dtype or model.model.embed_tokens.weight.dtype)
    _write_config(folder, content)


def _to_store(model: DeepseekV3, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in published_tensors(model):
        yield name, _cast(name, tensor, dtype).detach().cpu().contiguous()
    tensors = model.state_dict()
    for copy, name in stored_copies(model.config).items():  # cloned: a file takes no two names for one memory
        yield copy, _cast(name, tensors[name], dtype).detach().cpu().clone()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or name.endswith(BIAS) else tensor.to(dtype)


def _write_config(folder: Path, content: dict[str, Any]) -> None:
    write_json(folder / CONFIG, content, indent=2)


@torch.no_grad()
def load_pretrained(folder: Path | str) -> DeepseekV3:
    """The model of a checkpoint folder, on the CPU, in the stored type; FP8 weights come as bfloat16.

    `model.eos_ids` are those of its generation_config.json. Raises CheckpointError for anything missing,
    extra, of a wrong shape or type, or unreadable.
    """
    stored = open_checked(folder)
    config = _stored_config(stored)
    with torch.device("meta"):
        model = DeepseekV3(config)
    dtype = PLAIN.get(stored.entries["model.embed_tokens.weight"].dtype, torch.bfloat16)
    model = model.to_empty(device="cpu").to(dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    fill(model, stored)
    model.eos_ids = _eos_ids(Path(folder))
    return model


@torch.no_grad()
def fill(model: DeepseekV3, stored: Stored) -> None:
    """Copy checked tensors into a model's, in the model's types."""
    places = dict(published_tensors(model))
    for name in stored.names():
        if name in places:
            places[name].copy_(stored.value(name))
    reset_loads(model)


def open_checked(folder: Path | str) -> Stored:
    """A checkpoint's tensors, checked by their headers.

    MTP layers may be left out though config.json names them, and so may their copies of embedding and head.
    Raises CheckpointError.
    """
    model_config_from(folder)  # a wrong config.json is told before missing weights are
    stored = Stored(folder)
    config = _stored_config(stored)
    check(stored, published_shapes(config), stored_copies(config))
    return stored


def _stored_config(stored: Stored) -> ModelConfig:
    """What config.json says, without MTP layers where none is stored: transformers leaves them out."""
    config = model_config_from(stored.folder)
    if any(layer_of(name) >= config.num_hidden_layers for name in stored.entries):
        return config
    return replace(config, num_nextn_predict_layers=0)


def _eos_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a completion; () where no generation_config.json says."""
    if not (folder / GENERATION).exists():
        return ()
    found = read_object(folder / GENERATION).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(
            f"{folder / GENERATION}: eos_token_id={found} is no token, nor a list of tokens"
        )
    return tuple(ids)


def convert(
    source: Path | str, target: Path, precision: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Stored:
    """Stream a checkpoint's weights and config.json to `target`, then compare every bit with what was meant.

    `precision` None keeps every tensor's bits, FP8 with its scales and MTP layers included; float32 and
    bfloat16 cast; fp8 quantises what DeepSeek-V3 does and casts the rest to bfloat16. -> what was read.
    Raises CheckpointError, ConfigError for an unknown precision.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"dtype {precision} is none of {', '.join(PRECISIONS)}")
    stored = open_checked(source)
    write_shards(converted(stored, precision), target, shard_bytes)
    written = Stored(target)
    for name, tensor in converted(stored, precision):
        if not _same_bits(tensor, written.raw(name)):
            raise CheckpointError(
                f"{written.entries[name].path}: tensor {name} was not written as it is; try again"
            )
    _write_config(target, _converted_config(stored, written))
    open_checked(target)
    return stored


def converted(stored: Stored, precision: str | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint as they are to be stored, file by file."""
    for name in stored.names():
        if precision is None or (precision == "fp8" and stored.is_fp8(name)):
            yield name, stored.raw(name)
            if stored.is_fp8(name):
                yield name + SCALE, stored.raw(name + SCALE)
        elif precision == "fp8" and _is_quantised(name):
            weight, scale = quantise_blocks(stored.value(name))
            yield name, weight
            yield name + SCALE, scale
        else:
            yield (
                name,
                _cast(
                    name, stored.value(name), PLAIN["BF16"] if precision == "fp8" else PRECISIONS[precision]
                ),
            )


def _is_quantised(name: str) -> bool:
    """Whether V3's published files have it in FP8: all projections but the one that joins MTP's halves."""
    return "_proj" in name and not name.endswith("eh_proj.weight")


def _converted_config(source: Stored, target: Stored) -> dict[str, Any]:
    """The source's config.json with the published keys complete, and what the target's tensors are."""
    content = read_object(source.folder / CONFIG)
    config = _stored_config(source)
    for key in ("quantization_config", "rope_parameters", "dtype"):  # the latter two: transformers' spelling
        content.pop(key, None)
    embedding = target.entries["model.embed_tokens.weight"].dtype
    content |= published_config(config, PLAIN.get(embedding, torch.bfloat16))
    if any(target.is_fp8(name) for name in target.entries):
        content["quantization_config"] = QUANTIZATION
    return content


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
