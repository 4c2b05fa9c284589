"""Checks before a stage starts: whether its parents' shapes, tokenizers and chat templates fit."""

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
    """Raises CheckpointError if the checkpoint's config.json has another shape than `model`."""
    published = read_object(Path(parent.checkpoint) / "config.json")
    for key, value in asdict(model).items():
        if key not in UNCHECKED and differs(published, key, value):
            fitting = [name for name in options("model") if fits(published, read(f"model/{name}"))]
            other = f"give model={fitting[0]}" if fitting else f"give a model with this {key}"
            remedy = f"drop model.{key}={value}" if model.name in fitting else other
            raise CheckpointError(
                f"{parent.checkpoint} has {key}={published[key]}, but the config has model.{key}={value}; "
                f"{remedy}"
            )


UNCHECKED = ("name", "initializer_range")  # keys that may differ between a checkpoint and the model


def fits(published: dict[str, Any], shape: dict[str, Any]) -> bool:
    return not any(differs(published, key, value) for key, value in shape.items() if key not in UNCHECKED)


def differs(published: dict[str, Any], key: str, value: Any) -> bool:
    """Whether a checkpoint's config.json has another value; it may leave keys out."""
    own = published.get(key, value)
    if isinstance(own, dict) and isinstance(value, dict):
        return any(differs(own, inner, wanted) for inner, wanted in value.items())
    return own != value


def check_same_chat_format(weights: ParentRef | None, read: Iterable[ParentRef]) -> None:
    """Raises CheckpointError if a parent has no tokenizer, or one with more tokens than the embedding has
    rows, or if two parents have different tokens or chat templates.

    This reads JSON alone; the job loads the tokenizers themselves (`Run.load_chat`).
    """
    parents = [parent for parent in (weights, *read) if parent is not None]
    formats = [chat_format(Path(parent.checkpoint)) for parent in parents]
    for parent, chat in zip(parents, formats, strict=True):
        if chat != formats[0]:
            what = "tokenizer" if chat[0] != formats[0][0] else "chat template"
            raise CheckpointError(
                f"{parent.checkpoint} (stage {parent.stage}) has another {what} than "
                f"{parents[0].checkpoint}; take both from one pipeline"
            )


def chat_format(checkpoint: Path) -> tuple[str, str]:
    """Hashes of a checkpoint's tokens with their ids, and of its chat template. Raises CheckpointError."""
    for name in (TOKENIZER, TOKENIZER_SETTINGS):
        if not (checkpoint / name).exists():
            raise CheckpointError(
                f"{checkpoint / name} is missing: a stage cannot start from a checkpoint without tokenizer "
                "and chat template; put them there and import again"
            )
        inside(checkpoint, name, checkpoint)
    ids = _tokens(checkpoint / TOKENIZER)
    shape = checkpoint / "config.json"  # a checkpoint of reward models has one for each model instead
    rows = read_object(shape).get("vocab_size") if shape.exists() else None
    last = max(ids.values(), default=-1)
    if isinstance(rows, int) and last >= rows:
        raise CheckpointError(
            f"{checkpoint / TOKENIZER} has token {last}, but {shape} has "
            f"vocab_size={rows}; give the tokenizer that the weights were trained with"
        )
    return _hash(ids), template_hash(checkpoint)


def _tokens(path: Path) -> dict[str, int]:
    """Token -> id, added tokens included. Raises CheckpointError."""
    content = read_object(path)
    try:
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram: [token, score], ordered by id
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        return {str(token): int(number) for token, number in (vocabulary | added).items()}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise CheckpointError(f"{path}: the vocabulary cannot be read; export it again") from None


def template_hash(checkpoint: Path) -> str:
    """SHA-256 of the chat template, as in records. Raises CheckpointError."""
    path = checkpoint / TOKENIZER_SETTINGS
    template = read_object(path).get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{path} has no chat_template; export it again")
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
