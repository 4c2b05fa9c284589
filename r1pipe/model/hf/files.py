"""Load and save a model of transformers; nothing is unpickled, and no code from the folder is executed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from r1pipe.config.hf import longest_exact
from r1pipe.core.errors import CheckpointError
from r1pipe.model.hf import lora
from r1pipe.model.hf.policy import HFModel
from r1pipe.model.reading import eos_ids
from r1pipe.model.shards import SHARD_BYTES, Later, at_once, write_shards
from r1pipe.runs import heartbeat
from r1pipe.runs.files import read_object

ROUNDING = 0.1  # how far bfloat16 may move a document's states, as a share of their norm


def load(
    folder: Path,
    attention: str | None = None,
    longest: int | None = None,
    runs: Callable[[torch.nn.Module], AbstractContextManager[object]] = nullcontext,
) -> HFModel:
    """The model of a folder in Hugging Face's format, on the CPU, in the stored type.

    `attention`: transformers' implementation, "sdpa" or "eager"; None: sdpa where the architecture has it.
    `longest`: tokens of the longest row; None: as many as the folder's config.json allows. `runs`: a block in
    which the model, where it comes sharded, can run. Raises CheckpointError, one line, for an architecture
    that transformers does not know or that r1pipe cannot train exactly.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from r1pipe.model.hf.attention import SDPA_OR_SHORT

    config = check_architecture(folder)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with heartbeat.at("loading weights", patient=True):
            whole, problems = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        line = " ".join(str(error).split())
        if "scaled_dot_product_attention" in line:
            line = "its architecture has no sdpa; give model.attention=eager"
        raise CheckpointError(f"{folder}: transformers cannot load these weights: {line[:300]}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, problems[kind])):
            raise CheckpointError(
                f"{folder}: {names[0]} and {len(names) - 1} other tensors are {kind.removesuffix('_keys')}"
                f" for {type(whole).__name__}; give weights and config.json of one model"
            )
    if whole.config._attn_implementation == "sdpa":
        whole.config._attn_implementation = SDPA_OR_SHORT
    model = HFModel(whole.eval(), _longest(folder, config, longest))
    try:
        with runs(whole):
            _check_head(whole, folder)
            _check_packing(model, folder)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        line = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: {type(whole).__name__} cannot read a packed row ({line}); give another model"
        ) from None
    model.eos_ids = eos_ids(folder, config.eos_token_id)
    return model


def empty(folder: Path, on_meta: bool = False) -> HFModel:
    """A model of the folder's config.json whose weights are still to be filled in; in float32, on the CPU.

    `on_meta`: its weights take no memory; its buffers, which the files lack, are there all the same. Raises
    CheckpointError as `load` does.
    """
    from transformers import AutoModelForCausalLM

    config = check_architecture(folder)
    with (
        torch.random.fork_rng(devices=[]),  # transformers draws initial weights from the global stream
        _weights_on_meta() if on_meta else nullcontext(),
    ):
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return HFModel(whole, _longest(folder, config, None))


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """A block in which modules are built without memory for weights; buffers are built as ever."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, weight: torch.nn.Parameter | None) -> None:
        if weight is not None and not weight.is_meta:
            weight = torch.nn.Parameter(weight.to("meta"), weight.requires_grad)
        register(module, name, weight)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def check_architecture(folder: Path) -> Any:
    """The folder's config, of transformers. Raises CheckpointError where a model of it cannot be trained."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    content = read_object(folder / "config.json")
    kind = content.get("model_type")
    if content.get("quantization_config"):
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config: quantised weights cannot be trained; give "
            "the folder of the model before quantisation"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers knows no causal language model of model_type {kind}; "
            "give a folder of another model, or update transformers"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        line = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder / 'config.json'} cannot be read by transformers: {line}") from None
    others = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"})
    if others:
        raise CheckpointError(
            f"{folder / 'config.json'}: {kind} has layers of {others[0]}, but a mask for attention over all "
            "earlier tokens is all that keeps packed documents apart; give another model"
        )
    if "max_position_embeddings" not in config.to_dict():
        raise CheckpointError(
            f"{folder / 'config.json'}: {kind} has no max_position_embeddings; give another model"
        )
    return config


def _longest(folder: Path, config: Any, wanted: int | None) -> int:
    """Tokens of the longest row: `wanted`, or the most that are read alike whatever stands beside them.

    Raises CheckpointError where that is less than `wanted`.
    """
    most, why = longest_exact(config.to_dict())
    if (wanted or 0) > most:
        raise CheckpointError(
            f"{folder}: model.max_position_embeddings={wanted} is longer than {why}={most}; give "
            f"model.max_position_embeddings={most} or less"
        )
    return wanted or most


@torch.no_grad()
def _check_head(whole: Any, folder: Path) -> None:
    """Raises CheckpointError where logits are more than the head's product with the last states."""
    seen: dict[str, Any] = {}
    hooks = [
        whole.base_model.register_forward_hook(lambda module, inputs, output: seen.update(states=output[0])),
        whole.get_output_embeddings().register_forward_hook(
            lambda module, inputs, output: seen.update(read=inputs[0], made=output)
        ),
    ]
    try:
        tokens_BT = (torch.arange(8) % whole.get_output_embeddings().out_features).unsqueeze(0)
        logits = whole(input_ids=tokens_BT, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(seen["states"], seen["read"]), (seen["made"], logits)]
    if not all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs):
        raise CheckpointError(
            f"{folder}: {type(whole).__name__} scales or caps states or logits around its head, which r1pipe "
            "does not; give another model"
        )


@torch.no_grad()
def _check_packing(model: HFModel, folder: Path) -> None:
    """Raises CheckpointError where a document's states depend on what stands before it in its row."""
    tokens_BT = (torch.arange(16) % model.config.vocab_size).unsqueeze(0)
    segments_BT = torch.tensor([[1] * 8 + [2] * 8])
    packed_TD, alone_TD = model.model(tokens_BT, segments_BT)[0, 8:], model.model(tokens_BT[:, 8:])[0]
    if float((packed_TD - alone_TD).float().norm()) > ROUNDING * float(alone_TD.float().norm()):
        raise CheckpointError(
            f"{folder}: {type(model.whole).__name__} reads a document otherwise behind another one in a row "
            "than alone (positions or masks of its own); give another model"
        )


def published(model: HFModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One tensor of `model.whole` under the names that `save` gives it; in memory experts are one tensor."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model.whole, {name: tensor})


def write(
    model: HFModel,
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    later: Later = at_once,
) -> None:
    """Tensors by the names of `published` and config.json, as transformers writes them; the tokenizer and
    generation_config.json are the caller's. Adapters, which are merged into the tensors, are written alone
    into the subfolder lora.FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = iter(tensors)
    first = next(rest)
    if model.adapter:  # whole from the first tensor to the last
        lora.save(model, folder / lora.FOLDER)
    on_cpu = ((name, tensor.detach().cpu().contiguous()) for name, tensor in chain([first], rest))
    write_shards(on_cpu, folder, shard_bytes, later)
    dtype = str(model.whole.dtype).removeprefix("torch.")
    model.whole.config.dtype, model.whole.config.architectures = dtype, [type(model.whole).__name__]
    model.whole.config.save_pretrained(folder)
