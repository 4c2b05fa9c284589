"""The bundled model: its shapes and its initial weights."""

from pathlib import Path

import pytest
import torch
import yaml
from shapes import SHAPES, ours, tiny, tokens

from r1pipe.config import ModelConfig, RopeScaling
from r1pipe.core.errors import ConfigError
from r1pipe.model import (
    DeepseekV3,
)
from r1pipe.model.moe import gates

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


SHIPPED = sorted(path for path in CONF.glob("*.yaml") if path.stem != "hf")  # whose folder has the shape


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_shape_builds(path):
    values = yaml.safe_load(path.read_text())
    if values["rope_scaling"]:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    with torch.device("meta"):
        model = DeepseekV3(ModelConfig(**values))
    billions = {"v3": 671.0, "moonlight": 15.96, "v2_lite": 15.71, "bench_1b": 0.94}
    billions |= {"small": 0.0101, "bench": 0.0103, "laptop": 0.0013, "student": 0.00026}
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
