"""Whether a parent's checkpoint fits a stage: shape, tokenizer, chat template; told before it starts."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1pipe.config import ModelConfig, ParentRef
from r1pipe.config.groups import options, read
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import inside
from r1pipe.runs.files import read_object

TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"


def check_parent_fits(parent: ParentRef, model: ModelConfig) -> None:
    """Raises CheckpointError where the checkpoint's config.json has another shape than `model`."""
    published = read_object(Path(parent.checkpoint) / "config.json")
    for key, value in asdict(model).items():
        if key not in ITS_OWN and differs(published, key, value):
            like = [name for name in options("model") if fits(published, read(f"model/{name}"))]
            other = f"give model={like[0]}" if like else f"give a model whose {key} is the same"
            remedy = f"drop model.{key}={value}" if model.name in like else other
            has = f"{parent.checkpoint} has {key}={published[key]}"
            raise CheckpointError(f"{has}, but the config says model.{key}={value}; {remedy}")


ITS_OWN = ("name", "initializer_range")  # what may differ between a checkpoint and the model it becomes


def fits(published: dict[str, Any], shape: dict[str, Any]) -> bool:
    return not any(differs(published, key, value) for key, value in shape.items() if key not in ITS_OWN)


def differs(published: dict[str, Any], key: str, value: Any) -> bool:
    """Whether a checkpoint's config.json says otherwise; of what it leaves out it says nothing."""
    there = published.get(key, value)
    if isinstance(there, dict) and isinstance(value, dict):
        return any(differs(there, inner, wanted) for inner, wanted in value.items())
    return there != value


def check_same_chat_format(weights: ParentRef | None, read: Iterable[ParentRef]) -> None:
    """Raises CheckpointError where a parent has no tokenizer, or one with more tokens than the embedding has
    rows, or where two parents have other tokens or another chat template.

    This reads JSON alone; the job asks the tokenizers themselves (`Run.load_chat`).
    """
    known = [one for one in (weights, *read) if one is not None]
    formats = [chat_format(Path(one.checkpoint)) for one in known]
    for parent, (tokens, template) in zip(known[1:], formats[1:], strict=True):
        for what, ours, theirs in (
            ("tokenizer", formats[0][0], tokens),
            ("chat template", formats[0][1], template),
        ):
            if ours != theirs:
                raise CheckpointError(
                    f"{parent.checkpoint} (stage {parent.stage}) has another {what} than "
                    f"{known[0].checkpoint}; take both from one pipeline"
                )


def chat_format(checkpoint: Path) -> tuple[str, str]:
    """Hashes of a checkpoint's tokens with their ids, and of its chat template. Raises CheckpointError."""
    for name in (TOKENIZER, TOKENIZER_SETTINGS):
        if not (checkpoint / name).exists():
            raise CheckpointError(
                f"{checkpoint / name} is missing: a stage cannot start from a checkpoint without tokenizer "
                "and chat template; put fitting ones there and import again"
            )
        inside(checkpoint, name, checkpoint)
    ids = _tokens(checkpoint / TOKENIZER)
    shape = checkpoint / "config.json"  # a checkpoint of reward models has none: its models have their own
    rows = read_object(shape).get("vocab_size") if shape.exists() else None
    last = max(ids.values(), default=-1)
    if isinstance(rows, int) and last >= rows:
        raise CheckpointError(
            f"{checkpoint / TOKENIZER} has token {last}, but {shape} says "
            f"vocab_size={rows}; give the tokenizer that the weights were trained with"
        )
    return _hash(ids), template_hash(checkpoint)


def _tokens(path: Path) -> dict[str, int]:
    """Every token's id, those added to the vocabulary included. Raises CheckpointError."""
    content = read_object(path)
    try:
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram: [token, score] in order of ids
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        added = {one["content"]: one["id"] for one in content.get("added_tokens") or []}
        return {str(token): int(number) for token, number in (vocabulary | added).items()}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise CheckpointError(f"{path}: the vocabulary cannot be read; export it again") from None


def template_hash(checkpoint: Path) -> str:
    """SHA-256 of the chat template's source, as records have it. Raises CheckpointError."""
    path = checkpoint / TOKENIZER_SETTINGS
    template = read_object(path).get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{path} holds no chat_template; export it again")
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
