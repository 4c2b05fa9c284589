"""A tokenizer's special tokens: R1's own, or those that a model of another family brings."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from r1pipe.core.errors import CheckpointError
from r1pipe.runs.files import read_object

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT)  # never produced by encoding a user's text
PLAIN_TOKENS = (THINK, END_THINK)  # one token each, but part of the text


@dataclass(frozen=True)
class Special:
    """What a chat needs to know of the special tokens."""

    bos: str  # "": none
    eos: str  # ends a turn
    bos_id: int | None
    eos_id: int
    pad_id: int
    eos_ids: tuple[int, ...]  # all that end a completion
    texts: tuple[str, ...]  # all special tokens: no user's text may speak as the template


def of_r1(tokenizer: Tokenizer) -> Special:
    """R1's tokens. Raises CheckpointError where one is missing."""
    bos, eos, pad = (_known(tokenizer, token) for token in (BOS, EOS, PAD))
    return Special(BOS, EOS, bos, eos, pad, (eos,), SPECIAL_TOKENS)


def of_folder(folder: Path, tokenizer: Tokenizer) -> Special:
    """R1's tokens where the tokenizer has them; or else those of tokenizer_config.json, where EOS ends a text
    (`ended_by` finds what ends a turn), and those of generation_config.json.

    Raises CheckpointError where the folder names no EOS, or a token that the tokenizer does not have.
    """
    if all(tokenizer.token_to_id(token) is not None for token in SPECIAL_TOKENS):
        return of_r1(tokenizer)
    path = folder / "tokenizer_config.json"
    beside = (
        folder / "special_tokens_map.json"
    )  # where older files have what tokenizer_config.json leaves out
    settings = {**(read_object(beside) if beside.is_file() else {}), **read_object(path)}
    bos, eos, pad = (_text(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad"))
    if not eos:
        raise CheckpointError(f"{path} names no eos_token; give the one that ends a text")
    generation = folder / "generation_config.json"
    listed = read_object(generation).get("eos_token_id") if generation.exists() else None
    more = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int and tokenizer.id_to_token(token) is not None for token in more):
        raise CheckpointError(f"{generation}: eos_token_id={listed} is no token of {path.parent}; correct it")
    eos_id = _known(tokenizer, eos)
    added = tokenizer.get_added_tokens_decoder().values()
    return Special(
        bos,
        eos,
        _known(tokenizer, bos) if bos else None,
        eos_id,
        _known(tokenizer, pad) if pad else eos_id,
        tuple(dict.fromkeys([eos_id, *more])),
        tuple(token.content for token in added if token.special and token.content not in PLAIN_TOKENS),
    )


def ended_by(special: Special, tokenizer: Tokenizer, after: str) -> Special:
    """The same, with the first special token in `after`, the text that a template writes after an answer, as
    the end of a turn: of Qwen's two ends <|im_end|>, of Llama 3's <|eot_id|>."""
    for token in tokenizer.encode(after, add_special_tokens=False).tokens:
        if token in special.texts and token != special.bos:
            number = _known(tokenizer, token)
            eos_ids = tuple(dict.fromkeys([number, *special.eos_ids]))
            return replace(special, eos=token, eos_id=number, eos_ids=eos_ids)
    return special


def _text(token: Any) -> str:
    """A token of tokenizer_config.json: text, or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _known(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise CheckpointError(f"the tokenizer has no token {token}; give the one that the weights came with")
    return number
