"""Reads a checkpoint folder tensor by tensor: memory stays near the largest file, whatever the model's size.

Nothing is ever unpickled. Every fault is a CheckpointError of one line that names file and tensor.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1pipe.core.errors import CheckpointError
from r1pipe.model.kernels.reference import Scaled, dequantise, tiles
from r1pipe.runs import heartbeat
from r1pipe.runs.files import read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
SCALE = "_scale_inv"  # suffix of an FP8 weight's name
COMPUTED = ".rotary_emb.inv_freq"  # a buffer in older files, Moonlight's too; it follows from config.json
FP8 = "F8_E4M3"
PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
REMAP_BYTES = 1 << 28  # a mapped file is reopened after reading this much, because its pages count as memory

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Entry:
    """A tensor's entry in a file's header."""

    path: Path
    dtype: str  # safetensors' name: BF16, F32, F8_E4M3 ...
    shape: tuple[int, ...]


class Stored:
    """The tensors of a checkpoint folder. Raises CheckpointError where index and files do not agree."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        index = self.folder / INDEX
        self.listing = index if index.exists() else self.folder / WEIGHTS  # the file that lists the tensors
        entries = _indexed(index) if index.exists() else _headers(self.listing)
        self.entries = {name: entry for name, entry in entries.items() if not name.endswith(COMPUTED)}
        self._file: tuple[Path, Any] | None = None
        self._read_bytes = 0

    def names(self) -> list[str]:
        """All names but the scales', file by file: reading in this order opens each file once."""
        scales = {name + SCALE for name in self.entries}
        return sorted(self.entries.keys() - scales, key=lambda name: (self.entries[name].path.name, name))

    def is_fp8(self, name: str) -> bool:
        return self.entries[name].dtype == FP8

    def raw(self, name: str) -> Tensor:
        """The stored tensor, memory-mapped until it is copied."""
        path = self.entries[name].path
        if self._file is None or self._file[0] != path or self._read_bytes > REMAP_BYTES:
            self._file, self._read_bytes = None, 0
            self._file = path, _opened(path)
        try:
            tensor: Tensor = self._file[1].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error})") from None
        self._read_bytes += tensor.nbytes
        heartbeat.tick()
        return tensor

    def value(self, name: str) -> Tensor:
        """The tensor to compute with: FP8 is dequantised to bfloat16, rounded once."""
        if not self.is_fp8(name):
            return self.raw(name)
        scale = self.raw(name + SCALE).clone()
        return dequantise(Scaled(self.raw(name), scale), torch.bfloat16)

    @property
    def parameters(self) -> int:
        return sum(math.prod(self.entries[name].shape) for name in self.names())


def eos_ids(folder: Path | str, otherwise: Any = None) -> tuple[int, ...]:
    """The tokens that end a completion, of a folder's generation_config.json; without that file `otherwise`.

    Raises CheckpointError.
    """
    generation = Path(folder) / GENERATION
    value = read_object(generation).get("eos_token_id") if generation.exists() else otherwise
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{generation}: eos_token_id={value} must be a token id or a list of token ids")
    return tuple(ids)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}); copy the checkpoint again") from None


def _headers(path: Path) -> dict[str, Entry]:
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: Entry(path, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def _indexed(index: Path) -> dict[str, Entry]:
    """The tensors that the index lists, which must be exactly those in the shards."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} lacks weight_map; copy the checkpoint again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor {name} must name a file of this folder, not {shard!r}")
        if not (index.parent / shard).exists():
            raise CheckpointError(f"{index.parent / shard} is missing; {index.name} puts tensor {name} there")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        in_shard = _headers(path)
        listed = {name for name, file in weight_map.items() if file == shard}
        for name in sorted(listed - in_shard.keys()):
            raise CheckpointError(f"{path} lacks tensor {name}, which {index.name} puts there")
        for name in sorted(in_shard.keys() - listed):
            raise CheckpointError(f"{path} holds tensor {name}, which {index.name} does not list")
        entries |= in_shard
    return entries


def check(stored: Stored, shapes: Shapes, optional: Collection[str] = ()) -> None:
    """Compare names, shapes, types and scales with the model that config.json describes, from headers alone.

    `optional` names may be missing. Raises CheckpointError for the first tensor that is wrong.
    """
    for name in sorted(shapes.keys() - stored.entries.keys() - set(optional)):
        raise CheckpointError(
            f"{stored.listing}: tensor {name} is missing; the weights do not fit config.json"
        )
    for name, entry in sorted(stored.entries.items()):
        if problem := _problem(name, entry, stored, shapes):
            raise CheckpointError(f"{entry.path}: tensor {name} {problem}")


def _problem(name: str, entry: Entry, stored: Stored, shapes: Shapes) -> str:
    weight = name.removesuffix(SCALE)
    if name != weight and weight in shapes:
        blocks = [tiles(size) for size in shapes[weight]]
        if weight not in stored.entries or not stored.is_fp8(weight):
            return "is the scale of no FP8 weight"
        if entry.dtype != "F32":
            return f"is stored as {entry.dtype}; a scale must be F32"
        if list(entry.shape) != blocks:
            return f"has shape {list(entry.shape)}; blocks of 128 x 128 need {blocks}"
        return ""
    if name not in shapes:
        return "has no place in the model that config.json describes"
    if entry.shape != shapes[name]:
        return f"has shape {list(entry.shape)}, config.json needs {list(shapes[name])}"
    if entry.dtype == FP8 and len(entry.shape) == 2:
        return "" if name + SCALE in stored.entries else f"is FP8, but its scale {name}{SCALE} is missing"
    if entry.dtype not in PLAIN:
        types = f"{', '.join(PLAIN)}, or {FP8} with scales if it is a matrix"
        return f"is stored as {entry.dtype}; it must be {types}"
    return ""
