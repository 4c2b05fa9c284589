"""The headers of GGUF files, read without torch, and the config.json that they stand for.

The format is llama.cpp's: magic, version, counts; the metadata as key, type and value; for each tensor its
name, shape, type and offset; then the data. Source: docs/gguf.md of github.com/ggml-org/ggml. Little-endian
alone.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from r1pipe.core.errors import ConfigError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST = 100_000_000  # bytes of a text, entries of a list: a damaged length would ask for all memory
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # by type
SHORT = (
    1024  # entries of a list that is kept whole; longer ones are the tokenizer's, of which the length counts
)
LAYERS = {  # llama.cpp's names of a decoder layer's matrices -> transformers' in Llama, Qwen and their kin
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data."""

    metadata: dict[str, Any]  # lists of more than SHORT entries are given by their length
    shapes: dict[str, tuple[int, ...]]  # tensor -> shape, as PyTorch has it

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def value(self, key: str, default: Any = None) -> Any:
        """What the architecture's own `key` says; of a list with a value for each layer, the largest. Raises
        KeyError where it is missing and there is no default."""
        name = f"{self.architecture}.{key}"
        found = self.metadata[name] if default is None else self.metadata.get(name, default)
        return max(found) if isinstance(found, list) else found


def find(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without safetensors. Raises
    ConfigError where a folder has several."""
    if path.suffix == SUFFIX:
        return path
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ConfigError(f"{path} has {len(files)} {SUFFIX} files; give model.path={files[0]} or another")
    return files[0]


def read_header(path: Path) -> Header:
    """Raises ConfigError, one line, where a file is missing, damaged or cut off, or is no language model."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError("it does not begin with GGUF")
            version = _number(file, "I")
            if version not in VERSIONS:
                raise ValueError(f"version {version} is not one of {', '.join(map(str, VERSIONS))}")
            tensors, keys = _number(file, "Q"), _number(file, "Q")
            metadata = {_text(file): _value(file, _number(file, "I")) for _ in range(keys)}
            shapes, furthest = _tensors(file, tensors)
            begin = file.tell()
        if begin + furthest > path.stat().st_size:
            raise ValueError("it is cut off")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give model.path=FILE{SUFFIX}, or its folder") from None
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} is no whole GGUF file ({error}); copy it again") from None
    if not isinstance(metadata.get("general.architecture"), str) or "token_embd.weight" not in shapes:
        raise ConfigError(f"{path} has no architecture or no token_embd.weight; give a language model")
    return Header(metadata, shapes)


def as_config(path: Path) -> tuple[dict[str, Any], int]:
    """The keys of config.json that a GGUF file's header stands for, and the number of its weights.

    `model_type` is llama.cpp's name of the architecture. Raises ConfigError as read_header does.
    """
    header = read_header(path)
    rows, width = header.shapes["token_embd.weight"]
    try:
        heads = header.value("attention.head_count")
        content = {
            "model_type": header.architecture,
            "vocab_size": rows,
            "hidden_size": width,
            "num_hidden_layers": header.value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": header.value("attention.head_count_kv", heads),
            "head_dim": header.value("attention.key_length", width // heads),
            "intermediate_size": header.value("feed_forward_length", 4 * width),
            "max_position_embeddings": header.value("context_length"),
            "num_experts": header.value("expert_count", 0),
            "sliding_window": header.value("attention.sliding_window", 0),
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} has no {error} of a decoder; give a causal language model") from None
    return content, sum(math.prod(shape) for shape in header.shapes.values())


def layer_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the decoder layers' matrices by transformers' names, as far as LAYERS knows them."""
    named = ((name.split("."), shape) for name, shape in read_header(path).shapes.items())
    return {
        f"model.layers.{parts[1]}.{LAYERS[parts[2]]}.weight": shape
        for parts, shape in named
        if len(parts) == 4 and parts[0] == "blk" and parts[3] == "weight" and parts[2] in LAYERS
    }


def _tensors(file: BinaryIO, count: int) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes by name, and the furthest offset of a tensor's data."""
    shapes, furthest = {}, 0
    for _ in range(count):
        name = _text(file)
        sizes = [_number(file, "Q") for _ in range(_number(file, "I"))]
        _number(file, "I")  # the type
        shapes[name] = tuple(reversed(sizes))  # the innermost dimension comes first
        furthest = max(furthest, _number(file, "Q"))
    return shapes, furthest


def _number(file: BinaryIO, form: str) -> Any:
    size = struct.calcsize(f"<{form}")
    content = file.read(size)
    if len(content) < size:
        raise EOFError("it is cut off")
    return struct.unpack(f"<{form}", content)[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > MOST:
        raise ValueError("a text in it is too long")
    content = file.read(length)
    if len(content) < length:
        raise EOFError("it is cut off")
    return content.decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _text(file)
    if kind in NUMBERS:
        return _number(file, NUMBERS[kind])
    if kind != ARRAY:
        raise ValueError(f"a value of type {kind}")
    inner, count = _number(file, "I"), _number(file, "Q")
    if count > MOST or inner == ARRAY:
        raise ValueError("a list in it is too long")
    values = [_value(file, inner) for _ in range(count)]
    return values if count <= SHORT else count
