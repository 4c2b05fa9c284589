"""Tiny random models of transformers, each in a folder with a tokenizer and a chat template of its family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from r1pipe.chat.template import SPECIAL_TOKENS
from r1pipe.core.paths import content_dir
from r1pipe.runs.files import write_json

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].strip() if m.role == 'assistant' and not loop.last else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# family -> its special tokens, in the places that SPECIAL_TOKENS have in the bundled tokenizer
QWEN = ("<|fim_pad|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|fim_middle|>")
LLAMAS = ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "qwen": (
        QWEN,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "chat_template": CHATML},
    ),
    "llama": (
        LLAMAS,
        {
            "eos_token": {"content": "<|end_of_text|>"},
            "bos_token": "<|begin_of_text|>",
            "chat_template": LLAMA,
        },
    ),
}


def write_tokenizer(folder: Path, family: str) -> None:
    """The bundled byte-level BPE with the family's special tokens and template."""
    special, settings = SETTINGS[family]
    text = (content_dir() / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    for own, theirs in zip(SPECIAL_TOKENS, special, strict=True):
        text = text.replace(own, theirs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **settings})


def _shared() -> dict[str, Any]:
    return {
        "vocab_size": 1280,  # more rows than tokens, as published models have
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _config(name: str, changes: dict[str, Any]) -> Any:
    import transformers

    more: dict[str, dict[str, Any]] = {
        "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"head_dim": 16},
        "llama": {"rope_theta": 5e5},
        "qwen3_moe": {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    }
    classes: dict[str, Callable[..., Any]] = {
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
        "qwen3_moe": transformers.Qwen3MoeConfig,
    }
    return classes[name](**_shared() | more[name] | changes)


FAMILIES = ("qwen2", "qwen3", "llama", "qwen3_moe")


def write_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A whole folder as the hub has them, with `changes` to its config."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(_config(name, changes)).to(dtype)
    model.save_pretrained(folder)
    family = "llama" if name == "llama" else "qwen"
    write_tokenizer(folder, family)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = ["<|eot_id|>", "<|end_of_text|>"] if family == "llama" else ["<|im_end|>", "<|endoftext|>"]
    write_json(folder / "generation_config.json", {"eos_token_id": [tokens.token_to_id(end) for end in ends]})
    return folder
