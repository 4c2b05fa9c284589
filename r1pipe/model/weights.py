"""Checkpoints: load and save a model, and convert a checkpoint to another precision or shard size.

A folder holds safetensors under the published per-expert names and config.json in the published format.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from r1pipe.config import ModelConfig
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.model.kernels.reference import quantise_blocks
from r1pipe.model.layers import give_memory
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
from r1pipe.model.reading import PLAIN, SCALE, Stored, check, eos_ids
from r1pipe.model.shards import SHARD_BYTES, Later, at_once, write_shards
from r1pipe.model.transformer import DeepseekV3
from r1pipe.runs.files import read_object, write_json

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def save_pretrained(
    model: DeepseekV3, folder: Path | str, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json and model.safetensors (above `shard_bytes`: shards and an index) into `folder`.

    `dtype` casts the weights (None: unchanged); the router bias stays float32.
    """
    tensors = ((name, _cast(name, tensor, dtype)) for name, tensor in published_tensors(model))
    write(model.config, tensors, dtype or model.model.embed_tokens.weight.dtype, Path(folder), shard_bytes)


def write(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    later: Later = at_once,
) -> None:
    """Write config.json, which names `dtype`, and tensors by published name; as write_shards does."""
    write_shards(_with_copies(tensors, stored_copies(config)), folder, shard_bytes, later)
    write_json(folder / CONFIG, published_config(config, dtype), indent=2)


def _with_copies(
    tensors: Iterable[tuple[str, Tensor]], copies: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """On the CPU, and again under the names that published files repeat them by."""
    repeated: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        if name in copies.values():
            repeated[name] = value.clone()
        yield name, value
    for copy, name in copies.items():  # cloned: safetensors refuses shared memory
        yield copy, repeated[name].clone()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or name.endswith(BIAS) else tensor.to(dtype)


@torch.no_grad()
def load_pretrained(folder: Path | str) -> DeepseekV3:
    """The model of a checkpoint folder, on the CPU, in the stored type; FP8 weights come as bfloat16.

    `model.eos_ids` are those of its generation_config.json. Raises CheckpointError for anything missing,
    extra, of a wrong shape or type, or unreadable.
    """
    model, stored = open_empty(folder)
    model = give_memory(model, "cpu").to(dtype_of(stored))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    fill(model, stored)
    model.eos_ids = eos_ids(folder)
    return model


def open_empty(folder: Path | str) -> tuple[DeepseekV3, Stored]:
    """A checkpoint's model on the meta device, and its checked tensors. Raises CheckpointError."""
    stored, config = open_checked(folder)
    with torch.device("meta"):
        return DeepseekV3(config), stored


def dtype_of(stored: Stored) -> torch.dtype:
    """The type to compute with, that of the embedding, if it has its usual name; FP8 comes as bfloat16."""
    entry = stored.entries.get("model.embed_tokens.weight") or next(iter(stored.entries.values()))
    return PLAIN.get(entry.dtype, torch.bfloat16)


@torch.no_grad()
def fill(model: DeepseekV3, stored: Stored) -> None:
    """Copy checked tensors into a model's, in the model's types."""
    tensors = dict(published_tensors(model))
    for name in stored.names():
        if name in tensors:
            tensors[name].copy_(stored.value(name))
    reset_loads(model)


def open_checked(folder: Path | str) -> tuple[Stored, ModelConfig]:
    """A checkpoint's tensors, checked by their headers, and its config.

    MTP layers may be left out though config.json names them (transformers leaves them out), and then are not
    in the config; so may their copies of embedding and head. Raises CheckpointError.
    """
    config = model_config_from(folder)  # report a wrong config.json before missing weights
    stored = Stored(folder)
    if all(layer_of(name) < config.num_hidden_layers for name in stored.entries):
        config = replace(config, num_nextn_predict_layers=0)
    check(stored, published_shapes(config), stored_copies(config))
    return stored, config


def convert(
    source: Path | str, target: Path, precision: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Stored:
    """Stream a checkpoint's weights and config.json to `target`, then read back and compare every bit.

    `precision` None keeps every tensor's bits, FP8 with its scales and MTP layers included; float32 and
    bfloat16 cast; fp8 quantises what DeepSeek-V3 does and casts the rest to bfloat16. -> the source.
    Raises CheckpointError, ConfigError for an unknown precision.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"dtype {precision} is none of {', '.join(PRECISIONS)}")
    stored, config = open_checked(source)
    write_shards(converted(stored, precision), target, shard_bytes)
    written = Stored(target)
    for name, tensor in converted(stored, precision):
        read = written.raw(name)
        same_kind = (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        if not same_kind or not torch.equal(_bits(read), _bits(tensor)):
            raise CheckpointError(
                f"{written.entries[name].path}: tensor {name} was not written correctly; try again"
            )
    content = read_object(stored.folder / CONFIG)
    for key in ("quantization_config", "rope_parameters", "dtype"):  # the last two only transformers writes
        content.pop(key, None)
    embedding = written.entries["model.embed_tokens.weight"].dtype
    content |= published_config(config, PLAIN.get(embedding, torch.bfloat16))
    if any(map(written.is_fp8, written.entries)):
        content["quantization_config"] = QUANTIZATION
    write_json(target / CONFIG, content, indent=2)
    open_checked(target)
    return stored


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def converted(stored: Stored, precision: str | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint in the target's precision, file by file."""
    dtype = PLAIN["BF16"] if precision == "fp8" else PRECISIONS.get(precision or "")
    for name in stored.names():
        if precision is None or (precision == "fp8" and stored.is_fp8(name)):
            yield name, stored.raw(name)
            if stored.is_fp8(name):
                yield name + SCALE, stored.raw(name + SCALE)
        elif precision == "fp8" and "_proj" in name and not name.endswith("eh_proj.weight"):  # as published
            weight, scale = quantise_blocks(stored.value(name))
            yield name, weight
            yield name + SCALE, scale
        else:
            yield name, _cast(name, stored.value(name), dtype)
