"""Weights into shards of a bounded size and an index; one shard is in memory at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from r1pipe.model.reading import INDEX, WEIGHTS
from r1pipe.runs import heartbeat

SHARD_BYTES = 5 * 10**9  # as the hub's own libraries cut


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors, drawn one by one, into model.safetensors; above `shard_bytes` into several and an index.

    A tensor larger than `shard_bytes` gets a file of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            written.append(_write(shard, folder / _unnamed(len(written))))
            shard, size = {}, 0
        shard[name] = tensor
        heartbeat.tick()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    written.append(_write(shard, folder / _unnamed(len(written))))
    if len(written) == 1:
        (folder / _unnamed(0)).rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05}-of-{len(written):05}.safetensors"
        (folder / _unnamed(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _unnamed(number: int) -> str:
    return f".model-{number + 1:05}.unfinished"  # how many there will be is known at the end


def _write(shard: dict[str, Tensor], path: Path) -> list[str]:
    path.touch()
    permissions = (
        path.stat().st_mode
    )  # as the umask has it; safetensors puts a file of mode 0600 in its place
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(permissions)
    heartbeat.tick()
    return list(shard)
