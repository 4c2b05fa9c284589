"""A checkpoint folder's tensors, one at a time: memory stays near the largest file whatever the model's size.

Nothing is ever unpickled. Whatever does not fit is a CheckpointError of one line that names file and tensor.
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
SCALE = "_scale_inv"  # behind the name of an FP8 weight
COMPUTED = ".rotary_emb.inv_freq"  # a buffer that older files hold, Moonlight's too; config.json gives it
FP8 = "F8_E4M3"
PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
REMAP_BYTES = 1 << 28  # pages of a mapped file count as memory until it is closed: it is, after so many bytes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Entry:
    """What a file's header says of a tensor."""

    path: Path
    dtype: str  # in safetensors' words: BF16, F32, F8_E4M3 ...
    shape: tuple[int, ...]


class Stored:
    """The tensors of a checkpoint folder. Raises CheckpointError where index and files do not agree."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        index = self.folder / INDEX
        self.listing = index if index.exists() else self.folder / WEIGHTS  # the file that says what is there
        entries = _indexed(index) if index.exists() else _headers(self.listing)
        self.entries = {name: entry for name, entry in entries.items() if not name.endswith(COMPUTED)}
        self._file: tuple[Path, Any] | None = None
        self._read_bytes = 0

    def names(self) -> list[str]:
        """All but the scales, file by file: reading in this order opens each once."""
        weights = (name for name in self.entries if not self._is_scale(name))
        return sorted(weights, key=lambda name: (self.entries[name].path.name, name))

    def _is_scale(self, name: str) -> bool:
        return name.endswith(SCALE) and name.removesuffix(SCALE) in self.entries

    def is_fp8(self, name: str) -> bool:
        return self.entries[name].dtype == FP8

    def raw(self, name: str) -> Tensor:
        """The tensor as it is stored; it lies in the mapped file until it is copied."""
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
        """The tensor as numbers to compute with: FP8 comes dequantised to bfloat16, rounded once."""
        if not self.is_fp8(name):
            return self.raw(name)
        scale = self.raw(name + SCALE).clone()
        return dequantise(Scaled(self.raw(name), scale), torch.bfloat16)

    @property
    def parameters(self) -> int:
        return sum(math.prod(self.entries[name].shape) for name in self.names())


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
    """Every tensor that the index lists, which must be what the shards hold."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} lacks weight_map; copy the checkpoint again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor {name} must name a file of this folder, not {shard!r}")
        if not (index.parent / shard).exists():
            raise CheckpointError(f"{index.parent / shard} is missing, where {index.name} puts tensor {name}")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        held = _headers(index.parent / shard)
        promised = {name for name, place in weight_map.items() if place == shard}
        for name in sorted(promised - held.keys()):
            raise CheckpointError(
                f"{index.parent / shard} lacks tensor {name}, which {index.name} puts there"
            )
        for name in sorted(held.keys() - promised):
            raise CheckpointError(
                f"{index.parent / shard} holds tensor {name}, which {index.name} does not list"
            )
        entries |= held
    return entries


def check(stored: Stored, shapes: Shapes, optional: Collection[str] = ()) -> None:
    """Names, shapes, types and scales against what config.json asks for, from the headers alone.

    `optional` names may be missing. Raises CheckpointError for the first tensor that is wrong.
    """
    for name in sorted(shapes.keys() - stored.entries.keys() - set(optional)):
        raise CheckpointError(
            f"{stored.listing}: tensor {name} is missing; the weights do not fit config.json"
        )
    for name in sorted(stored.entries):
        entry = stored.entries[name]
        weight = name.removesuffix(SCALE)
        if name == weight or weight not in shapes:
            _check_weight(name, entry, shapes, stored)
        elif weight not in stored.entries or not stored.is_fp8(weight):
            raise CheckpointError(f"{entry.path}: tensor {name} is the scale of no FP8 weight")
        elif entry.dtype != "F32":
            raise CheckpointError(f"{entry.path}: tensor {name} is stored as {entry.dtype}, a scale is F32")
        elif entry.shape != (blocks := tuple(map(tiles, shapes[weight]))):
            raise CheckpointError(
                f"{entry.path}: tensor {name} has shape {list(entry.shape)}; blocks of 128 x 128 need"
                f" {list(blocks)}"
            )


def _check_weight(name: str, entry: Entry, shapes: Shapes, stored: Stored) -> None:
    if name not in shapes:
        raise CheckpointError(
            f"{entry.path}: tensor {name} has no place in the model that config.json describes"
        )
    if entry.shape != shapes[name]:
        raise CheckpointError(
            f"{entry.path}: tensor {name} has shape {list(entry.shape)},"
            f" config.json asks for {list(shapes[name])}"
        )
    if entry.dtype == FP8 and len(entry.shape) == 2:
        if name + SCALE not in stored.entries:
            raise CheckpointError(
                f"{entry.path}: tensor {name} is FP8, but its scale {name}{SCALE} is missing"
            )
    elif entry.dtype not in PLAIN:
        raise CheckpointError(
            f"{entry.path}: tensor {name} is stored as {entry.dtype}; it must be {', '.join(PLAIN)},"
            f" or {FP8} with scales if it is a matrix"
        )
