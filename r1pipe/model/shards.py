"""Writes tensors into safetensors files of a limited size, as they come."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from r1pipe.model.reading import INDEX, WEIGHTS
from r1pipe.runs import heartbeat

SHARD_BYTES = 2 * 10**9  # of a checkpoint's files, and so much memory of the rank that writes them
Shard = dict[str, Tensor]
Later = Callable[[Callable[[], None]], None]


def at_once(write: Callable[[], None]) -> None:
    write()


def write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    later: Later = at_once,
) -> None:
    """Write tensors into model.safetensors; above `shard_bytes` into shards and an index.

    One shard is in memory at a time. A tensor larger than `shard_bytes` gets a file of its own. The last
    shard, which may be the only one, is written by a function that `later` is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, list[str]]] = []
    shard: Shard = {}
    total = size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            written.append(_write(shard, folder, len(written) + 1))
            shard, size = {}, 0
        shard[name] = tensor
        heartbeat.tick()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    later(partial(_finish, shard, written, folder, total))


def _finish(shard: Shard, written: list[tuple[Path, list[str]]], folder: Path, total: int) -> None:
    """Write the last shard, and give all their names."""
    written.append(_write(shard, folder, len(written) + 1))
    if len(written) == 1:
        written[0][0].rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(written, 1):
        file = f"model-{number:05}-of-{len(written):05}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(shard: Shard, folder: Path, number: int) -> tuple[Path, list[str]]:
    path = folder / f".model-{number:05}.unfinished"  # the final name has the number of shards
    path.touch()
    permissions = path.stat().st_mode  # by the umask; safetensors would leave mode 0600
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(permissions)
    heartbeat.tick()
    return path, list(shard)
