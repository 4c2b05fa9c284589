"""Writes checkpoints as others publish them: shards with an index, BF16, FP32 or FP8, with or without MTP."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shapes import ours
from torch import Tensor

from r1pipe.config import ModelConfig
from r1pipe.model.mtp import stored_copies
from r1pipe.model.names import CONFIG, published_config, published_tensors

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
INDEX = "model.safetensors.index.json"


def publish(folder: Path, config: ModelConfig, kind: str, mtp: int = 0, shards: int = 3) -> dict[str, Tensor]:
    """The tensors written, by name; a scale mostly lies in another shard than its weight."""
    generator = torch.Generator().manual_seed(1)
    config = replace(config, num_nextn_predict_layers=mtp)
    tensors = dict(published_tensors(ours(config)))
    tensors |= {copy: tensors[name].clone() for copy, name in stored_copies(config).items()}
    for name, tensor in list(tensors.items()):
        if not name.endswith("e_score_correction_bias"):
            tensors[name] = tensor.detach().to(DTYPES[kind])
        if kind == "fp8" and "_proj" in name and "eh_proj" not in name:
            blocks = [-(-size // 128) for size in tensor.shape]
            tensors[name] = (torch.randn(tensor.shape, generator=generator) * 60).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.rand(blocks, generator=generator) * 4e-3 + 1e-4
    content = published_config(config, DTYPES[kind])
    if kind == "fp8":
        content["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(content))
    names = sorted(tensors)
    files = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name].contiguous() for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tensors


def stored_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whichever files they lie in."""
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def file_of(folder: Path, name: str) -> Path:
    """The shard that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def alter(folder: Path, name: str, change: Tensor | None) -> None:
    """Put another tensor in a tensor's place, or none; the index stays as it is."""
    path = file_of(folder, name)
    held = {key: value.clone() for key, value in load_file(path).items() if key != name}
    save_file(held if change is None else {**held, name: change}, path)


def forget(folder: Path, name: str) -> None:
    """Take a tensor out of its shard and the index."""
    alter(folder, name, None)
    content = json.loads((folder / INDEX).read_text())
    del content["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(content))


def promise(folder: Path, name: str, file: str) -> None:
    """Let the index say that a tensor lies in a file."""
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(content))
