"""Write a model's weights in the published layout, tensor by tensor, whole or gathered piece by piece."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from torch import Tensor

from r1pipe.model import weights
from r1pipe.model.buckets import buckets_of
from r1pipe.model.policy import Policy
from r1pipe.model.shards import Later, at_once
from r1pipe.model.transformer import DeepseekV3

BUCKET = 2**28  # bytes of weights that are made whole at a time


def save_pretrained(model: Policy, folder: Path | str) -> None:
    """Write config.json and the weights into `folder`, in the published layout and the model's type."""
    write_pretrained(model, tensors_of(model), Path(folder))


def tensors_of(model: Policy) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a whole model by published name; each holds until the next is asked for."""
    return chain.from_iterable(bucket.items() for bucket in buckets_of(model, BUCKET))


def write_pretrained(
    model: Policy, tensors: Iterable[tuple[str, Tensor]], folder: Path, later: Later = at_once
) -> None:
    """As save_pretrained, with the model's tensors by published name; `model` tells config and type alone.
    `later`: see write_shards."""
    if isinstance(model, DeepseekV3):
        dtype = model.model.embed_tokens.weight.dtype
        weights.write(model.config, tensors, dtype, folder, later=later)
        return
    from r1pipe.model.hf import files

    files.write(model, tensors, folder, later=later)
