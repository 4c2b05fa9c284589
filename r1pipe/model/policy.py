"""The models that every stage trains: the bundled DeepseekV3, or one of transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from r1pipe.model import native, weights
from r1pipe.model.cache import Decoder
from r1pipe.model.hf import HFModel, lora
from r1pipe.model.names import CONFIG, MODEL_TYPES, published_parts, published_tensors
from r1pipe.model.transformer import DeepseekV3
from r1pipe.runs.files import read_object

if TYPE_CHECKING:
    from r1pipe.model.hf.cache import HFDecoder

Policy = DeepseekV3 | HFModel


def of_transformers(folder: Path | str) -> bool:
    """Whether a checkpoint holds another model than DeepSeek's. Raises CheckpointError."""
    kind = read_object(Path(folder) / CONFIG).get("model_type")
    return isinstance(kind, str) and kind not in MODEL_TYPES


def load_pretrained(folder: Path | str, attention: str | None = None, longest: int | None = None) -> Policy:
    """The model of a checkpoint folder, on the CPU, in the stored type; see weights.load_pretrained.

    `attention` and `longest` are those of HFConfig, for a model of transformers. Raises CheckpointError.
    """
    if not of_transformers(folder):
        return weights.load_pretrained(folder)
    from r1pipe.model.hf import files

    return files.load(Path(folder), attention, longest)


def decoder_of(model: Policy, graphs: bool = False) -> "Decoder | HFDecoder":
    """The fastest decoder of the model with its current weights; see native.decoder_of."""
    if isinstance(model, DeepseekV3):
        return native.decoder_of(model, graphs)
    from r1pipe.model.hf.cache import HFDecoder

    return HFDecoder(model)


def named_weights(model: Policy) -> dict[str, torch.Tensor]:
    """The model's tensors by published name, as in the files of a checkpoint, with adapters merged."""
    if isinstance(model, DeepseekV3):
        return dict(published_tensors(model))
    named = (published_of(model, name, tensor) for name, tensor in own_tensors(model))
    return {name: tensor for of_one in named for name, tensor in of_one.items()}


def own_tensors(model: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters and buffers but adapters, each once, as they are: under ZeRO-3 maybe empty."""
    whole = model if isinstance(model, DeepseekV3) else model.whole
    seen: set[int] = set()
    for name, tensor in lora.without(whole.state_dict(keep_vars=True)):
        if id(tensor) not in seen:  # tied weights come under their first name
            seen.add(id(tensor))
            yield name, tensor


@torch.no_grad()
def published_of(model: Policy, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One of `own_tensors` under the names of the published format, which has experts one by one; with its
    adapter merged, which must be whole."""
    if isinstance(model, DeepseekV3):
        return dict(published_parts(name, tensor.detach()))
    from r1pipe.model.hf import files

    if model.adapter is not None:
        tensor = lora.merged_of(model.whole, name, tensor)
    return files.published(model, name, tensor.detach())
