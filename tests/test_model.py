"""The bundled model: its shapes, its initial weights and its checkpoints."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from shapes import SHAPES, V2_SHAPES, ours, tiny, tokens
from transformers import DeepseekV3ForCausalLM

from r1pipe.config.schema import ModelConfig, RopeScaling
from r1pipe.errors import CheckpointError, ConfigError
from r1pipe.model import (
    DeepseekV3,
    expert_loads,
    load_pretrained,
    model_config_from,
    save_pretrained,
)
from r1pipe.model.moe import gates
from r1pipe.model.weights import CONFIG, INDEX, WEIGHTS

CONF = Path(__file__).parent.parent / "conf" / "model"


def test_one_token_per_document_boundary_leaks_no_gradient():
    model = ours(SHAPES["v3"])
    tokens_BT = tokens(1, 12, model.config)
    segments = torch.tensor([[1] * 6 + [2] * 6])
    inner = model.model.embed_tokens.register_forward_hook(
        lambda _m, _i, out: embedded.append(out) or out.retain_grad()
    )
    embedded: list[torch.Tensor] = []
    model(tokens_BT, segments)[0, 6:].sum().backward()
    inner.remove()
    assert embedded[0].grad[0, :6].abs().max() == 0
    assert embedded[0].grad[0, 6:].abs().min() > 0


def test_casting_keeps_the_bias_and_runs():
    model = ours(SHAPES["v3"])
    bias = gates(model)[0].e_score_correction_bias.clone()
    tokens_BT = tokens(2, 16, model.config)
    full = model(tokens_BT)
    model.bfloat16()
    assert torch.equal(gates(model)[0].e_score_correction_bias, bias)
    logits = model(tokens_BT)
    assert logits.dtype == torch.bfloat16
    assert torch.corrcoef(torch.stack([logits.float().flatten(), full.flatten()]))[0, 1] > 0.95


def test_initial_weights_depend_on_the_generator_alone():
    config = tiny(initializer_range=0.02)
    state = torch.get_rng_state()
    one = DeepseekV3(config, torch.Generator().manual_seed(1)).state_dict()
    again = DeepseekV3(config, torch.Generator().manual_seed(1)).state_dict()
    other = DeepseekV3(config, torch.Generator().manual_seed(2)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert 0.019 < one["model.layers.1.mlp.experts.down_proj"].std() < 0.021


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_shape_builds(path):
    values = yaml.safe_load(path.read_text())
    if values["rope_scaling"]:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    with torch.device("meta"):
        model = DeepseekV3(ModelConfig(**values))
    billions = {"v3": 671.0, "moonlight": 15.96, "v2_lite": 15.71, "small": 0.0101, "laptop": 0.0013}
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert path.stem == model.config.name
    assert count == pytest.approx(billions[path.stem], rel=0.05)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "best"}, "topk_method"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(change, word):
    with pytest.raises(ConfigError, match=word) as error:
        DeepseekV3(tiny(**change))
    assert "\n" not in str(error.value)


def test_too_long_a_row_is_refused():
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        ours(tiny(max_position_embeddings=8))(torch.ones(1, 9, dtype=torch.long))


@pytest.mark.parametrize("name", ["v3_yarn", "tied", "v2_lite"])
def test_checkpoint_round_trip(name, tmp_path):
    model = ours((SHAPES | V2_SHAPES)[name])
    save_pretrained(model, tmp_path)
    names = load_file(tmp_path / WEIGHTS).keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names
    assert not any("gate_up" in key or "tokens_per_expert" in key for key in names)
    loaded = load_pretrained(tmp_path)
    assert dataclasses.replace(loaded.config, name="tiny") == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert expert_loads(loaded).sum() == 0
    tokens_BT = tokens(1, 9, model.config)
    assert torch.equal(loaded(tokens_BT), model(tokens_BT))


def test_transformers_loads_our_checkpoint(tmp_path):
    model = ours(SHAPES["v3"])
    save_pretrained(model, tmp_path)
    other = DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens_BT = tokens(2, 30, model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), other(tokens_BT).logits, atol=1e-4, rtol=0)
    published = json.loads((tmp_path / CONFIG).read_text())
    assert published["topk_method"] == "noaux_tc" and published["scoring_func"] == "sigmoid"


def test_saved_in_bfloat16_the_bias_stays_float32(tmp_path):
    save_pretrained(ours(SHAPES["v3"]), tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    loaded = load_pretrained(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert gates(loaded)[0].e_score_correction_bias.dtype == torch.float32


def _damage_tensors(folder: Path, change) -> None:
    stored = load_file(folder / WEIGHTS)
    change(stored)
    save_file(stored, folder / WEIGHTS)


def _write_index(folder: Path, shard: str) -> None:
    weight_map = dict.fromkeys(load_file(folder / WEIGHTS), shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


SHARD = "model-00001-of-00002.safetensors"
EXPERT = "model.layers.2.mlp.experts.7.down_proj.weight"
DAMAGE = {
    "missing tensor": (lambda f: _damage_tensors(f, lambda s: s.pop(EXPERT)), EXPERT),
    "extra tensor": (lambda f: _damage_tensors(f, lambda s: s.update(stray=torch.zeros(2))), "stray"),
    "wrong shape": (lambda f: _damage_tensors(f, lambda s: s.update({EXPERT: torch.zeros(2, 2)})), EXPERT),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-99]), "cut off"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "bad json": (lambda f: (f / CONFIG).write_text("{"), CONFIG),
    "no config": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "lacking key": (lambda f: (f / CONFIG).write_text("{}"), "vocab_size"),
    "pickle": (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04." * 50), WEIGHTS),
    "index of a lost shard": (lambda f: _write_index(f, SHARD), SHARD),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_refused_in_one_line(kind, tmp_path):
    save_pretrained(ours(SHAPES["v3"]), tmp_path)
    damage, word = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=word) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    if (tmp_path / CONFIG).exists() and kind not in ("bad json", "lacking key"):
        assert model_config_from(tmp_path).hidden_size == 64
