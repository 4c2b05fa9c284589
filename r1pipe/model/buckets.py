"""A model's weights in buckets, under their published names: what a sampler in another process is sent."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from r1pipe.model.hf import lora
from r1pipe.model.policy import Policy, own_tensors, published_of

Gathered = Callable[[Sequence[Tensor]], AbstractContextManager[object]]


def buckets_of(
    model: Policy,
    most_bytes: int,
    gathered: Gathered = lambda tensors: nullcontext(),
    elements: Callable[[Tensor], int] = Tensor.numel,
) -> Iterator[dict[str, Tensor]]:
    """All weights and persistent buffers, in the order of the layers, up to `most_bytes` at a time.

    A tensor larger than that is a bucket by itself; of a layer's experts, which are one tensor in memory,
    each bucket has some. `gathered` makes the given tensors whole for the length of a block, and `elements`
    tells their size before that (ZeRO-3). A bucket's tensors hold until the next one is asked for.
    """
    adapters = [*lora.weights(model).values()]  # small, and merged into the weights as these come
    with gathered(adapters) if adapters else nullcontext():
        group: dict[str, Tensor] = {}
        size = 0
        for name, tensor in own_tensors(model):
            more = elements(tensor) * tensor.element_size()
            if group and size + more > most_bytes:
                yield from _published(model, group, most_bytes, gathered)
                group, size = {}, 0
            group[name] = tensor
            size += more
        yield from _published(model, group, most_bytes, gathered)


def _published(
    model: Policy, group: dict[str, Tensor], most_bytes: int, gathered: Gathered
) -> Iterator[dict[str, Tensor]]:
    with gathered([*group.values()]):
        bucket: dict[str, Tensor] = {}
        size = 0
        for name, tensor in group.items():
            for published, part in published_of(model, name, tensor).items():
                if bucket and size + part.nbytes > most_bytes:
                    yield bucket
                    bucket, size = {}, 0
                bucket[published] = part
                size += part.nbytes
        yield bucket
