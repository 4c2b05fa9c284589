"""Tiny GGUF files, as llama.cpp's converter writes them, of the tiny models in hf_models."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from r1pipe.runs.files import read_object

NAMES = {  # transformers' part of a name -> llama.cpp's
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NORMAL, CONTROL = 1, 3  # types of tokens


def write_gguf(folder: Path, file: Path, architecture: str = "qwen2", template: bool = True) -> Path:
    """The Qwen2 model of `folder` (hf_models.write_model) as one GGUF file in float32."""
    import gguf

    config = read_object(folder / "config.json")
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, folder, config["vocab_size"], template)
    for name, weights in load_file(folder / "model.safetensors").items():
        for theirs, own in NAMES.items():
            name = name.replace(theirs, own)
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, folder: Path, rows: int, template: bool) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(content["model"]["vocab"])
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    by_id = {number: text for text, number in {**ids, **special}.items()}
    tokens = [by_id.get(number, f"<unused{number}>") for number in range(rows)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    settings = read_object(folder / "tokenizer_config.json")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if text in special else NORMAL for text in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(special[settings["eos_token"]])
    writer.add_pad_token_id(special[settings["pad_token"]])
    if template:
        writer.add_chat_template(settings["chat_template"])
