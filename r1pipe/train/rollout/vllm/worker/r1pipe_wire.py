"""Weights on their way from the trainer to vLLM's workers: a process group of their own, buckets of bytes.

Both ends import this file: the trainer as a module of r1pipe, vLLM's workers as one of the folder that it is
in. It needs torch alone. Rank 0 of the group is the trainer's rank 0, the workers follow.
"""

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGN = 16  # bytes: each tensor of a bucket begins at a multiple, so that it can be viewed in its type
POLL_S = 0.0005
PROTOCOL = 1  # what both ends must agree on: of init_info, and of how a bucket is laid out

Layout = list[tuple[str, str, list[int]]]  # name, type and shape of each tensor of a bucket, in order


class Broken(Exception):
    """The other end has failed; the group cannot be used any more."""


def join(
    store: dist.Store, rank: int, size: int, address: str, device: torch.device, timeout_s: float
) -> Any:
    """The process group of one connection: NCCL for tensors on a GPU, gloo for the rest.

    It is no part of torch's default group, so neither end needs to have one. `address`: of this machine, as
    the others reach it.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def connect(
    address: str, port: int, name: str, rank: int, size: int, device: torch.device, timeout_s: float
) -> Any:
    """A worker's end of the group `name`, whose store is at `address`."""
    with socket.create_connection((address, port), timeout=timeout_s) as reached:
        own = reached.getsockname()[0]
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, None, is_master=False, timeout=timeout, wait_for_workers=False)
    return join(dist.PrefixStore(name, store), rank, size, own, device, timeout_s)


def vocabulary_hash(words: Mapping[str, int]) -> str:
    """Of a tokenizer's tokens and their ids, whatever else may differ."""
    return hashlib.sha256(json.dumps(sorted(words.items())).encode()).hexdigest()


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()]


def _places(layout: Sequence[tuple[str, str, Sequence[int]]]) -> tuple[list[tuple[int, int]], int]:
    """(offset, bytes) of each tensor, and the bytes of the whole bucket."""
    places, end = [], 0
    for _, dtype, shape in layout:
        size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        places.append((end, size))
        end += -(-size // ALIGN) * ALIGN
    return places, end


def pack(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The tensors' bytes, one after the other, uint8 on `device`."""
    places, total = _places(layout_of(tensors))
    bucket = torch.zeros(total, dtype=torch.uint8, device=device)
    for (offset, size), tensor in zip(places, tensors.values(), strict=True):
        if size:
            bucket[offset : offset + size].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
    return bucket


def unpack(bucket: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, as views of it."""
    places, _ = _places(layout)
    for (offset, size), (name, dtype, shape) in zip(places, layout, strict=True):
        yield name, bucket[offset : offset + size].view(getattr(torch, dtype)).view(shape)


def send(group: Any, bucket: Tensor, failed: Callable[[], bool]) -> None:
    """Broadcast a bucket from rank 0. Raises Broken where `failed` says that nobody listens any more, or the
    connection is lost."""
    _wait(group, _broadcast(group, bucket), failed)


def receive(group: Any, layout: Layout, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the bucket that rank 0 sends, in memory of their own. Raises Broken."""
    _, total = _places(layout)
    bucket = torch.empty(total, dtype=torch.uint8, device=device)
    _wait(group, _broadcast(group, bucket), lambda: False)
    return unpack(bucket, layout)


def _broadcast(group: Any, bucket: Tensor) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    try:
        return group.broadcast([bucket], options)
    except RuntimeError as error:
        raise Broken(str(error).partition("\n")[0]) from None


def _wait(group: Any, work: Any, failed: Callable[[], bool]) -> None:
    """Wait for a broadcast, but not for one that nobody takes part in."""
    try:
        while not work.is_completed():
            if failed():
                group.abort()
                raise Broken("the other end has failed")
            time.sleep(POLL_S)
        work.wait()  # raises what went wrong, and makes a GPU's stream wait
    except RuntimeError as error:
        raise Broken(str(error).partition("\n")[0]) from None
