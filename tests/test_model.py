"""The bundled model against transformers, its packing and its balancing."""

from pathlib import Path

import pytest
import torch
import yaml
from shapes import SHAPES, V2_SHAPES, ours, tiny, tokens
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from r1pipe.config.schema import ModelConfig, RopeScaling
from r1pipe.errors import ConfigError
from r1pipe.model import (
    DeepseekV3,
    expert_loads,
    max_vio,
    reset_loads,
    update_router_bias,
)
from r1pipe.model.moe import Experts, gates
from r1pipe.model.names import published_config

CONF = Path(__file__).parent.parent / "conf" / "model"


def theirs(model: DeepseekV3):
    """The same weights in transformers, which reads our config.json and knows our tensor names."""
    kinds = {
        "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
        "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    }
    published = published_config(model.config, torch.float32)
    config_class, model_class = kinds[published["model_type"]]
    config = config_class(**published, attn_implementation="eager")
    other = model_class(config).eval()
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    return other


@pytest.mark.parametrize("name", [*SHAPES, *V2_SHAPES])
def test_logits_and_gradients_equal_transformers(name):
    config = (SHAPES | V2_SHAPES)[name]
    model = ours(config)
    other = theirs(model)
    tokens_BT = tokens(2, 96, config)
    mine, reference = model(tokens_BT), other(tokens_BT).logits
    assert reference.std() > 0.3
    torch.testing.assert_close(mine, reference, atol=1e-4, rtol=0)
    weight = torch.randn(mine.shape, generator=torch.Generator().manual_seed(5)) / mine.numel() ** 0.5
    (mine * weight).sum().backward()
    (reference * weight).sum().backward()
    for (key, parameter), (_, expected) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        torch.testing.assert_close(
            parameter.grad, expected.grad, atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", ["v3_yarn", "yarn_mscale", "v2_lite"])
@torch.no_grad()
def test_yarn_equals_transformers_at_long_positions(name):
    model = ours((SHAPES | V2_SHAPES)[name])
    tokens_BT = tokens(1, 1000, model.config)
    mine, reference = model(tokens_BT), theirs(model)(tokens_BT).logits
    torch.testing.assert_close(mine[:, -64:], reference[:, -64:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_documents_equal_the_documents_alone():
    model = ours(SHAPES["v3_yarn"])
    lengths = [5, 17, 1, 9]
    documents = [tokens(1, length, model.config)[0] for length in lengths]
    packed = torch.cat([*documents, torch.zeros(4, dtype=torch.long)]).unsqueeze(0)
    segments = torch.cat(
        [torch.full((n,), i + 1) for i, n in enumerate(lengths)] + [torch.zeros(4, dtype=torch.long)]
    )
    logits = model(packed, segments.unsqueeze(0))[0]
    assert logits.isfinite().all()
    for document, part in zip(documents, logits.split([*lengths, 4]), strict=False):
        torch.testing.assert_close(part, model(document.unsqueeze(0))[0], atol=1e-4, rtol=0)


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


@torch.no_grad()
def test_experts_equal_a_loop_over_tokens_even_when_some_stay_empty():
    config = SHAPES["few_experts"]
    experts: Experts = ours(config).model.layers[1].mlp.experts
    x_ND = torch.randn(40, config.hidden_size, generator=torch.Generator().manual_seed(0))
    experts_NK = torch.stack([torch.full((40,), 7), torch.arange(40) % 3 + 4], dim=1)
    weights_NK = torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    out_ND = torch.zeros_like(x_ND)
    for n in range(40):
        for expert, weight in zip(experts_NK[n], weights_NK[n], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x_ND[n]).chunk(2)
            out_ND[n] += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(experts(x_ND, weights_NK, experts_NK), out_ND, atol=1e-5, rtol=1e-4)


def test_loads_count_training_tokens_once():
    config = SHAPES["v3"]
    model = ours(config)
    tokens_BT = tokens(2, 20, config)
    model.train()
    model(tokens_BT)
    loads_LE = expert_loads(model)
    assert loads_LE.shape == (2, 16)
    assert loads_LE.sum(dim=-1).tolist() == [2 * 20 * 4] * 2
    with torch.no_grad():
        model(tokens_BT)
    model.eval()
    model(tokens_BT)
    assert torch.equal(expert_loads(model), loads_LE)

    reset_loads(model)
    model.train()
    hidden = checkpoint(model.hidden, tokens_BT, use_reentrant=False)
    hidden.sum().backward()
    assert torch.equal(expert_loads(model), loads_LE)


def test_bias_update_changes_choices_not_weights_and_lowers_max_vio():
    model = ours(tiny(n_group=1, topk_group=1)).train()
    tokens_BT = tokens(2, 64, model.config)
    violations = []
    for _ in range(25):
        reset_loads(model)
        model(tokens_BT)
        violations.append(max_vio(expert_loads(model)).mean().item())
        update_router_bias(model, expert_loads(model), 0.05)
    assert violations[-1] < 0.5 * violations[0]
    gate = gates(model)[0]
    assert gate.e_score_correction_bias.dtype == torch.float32

    x_ND = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    gate.e_score_correction_bias.zero_()
    before, chosen = gate(x_ND)
    gate.e_score_correction_bias.fill_(-3.0)  # a common offset
    after, same = gate(x_ND)
    assert torch.equal(chosen.sort(dim=1).values, same.sort(dim=1).values)
    torch.testing.assert_close(before.sort(dim=1).values, after.sort(dim=1).values)
    gate.e_score_correction_bias[5] = 10.0
    assert (gate(x_ND)[1] == 5).any(dim=1).all()


def test_bias_change_has_no_mean_and_rate_zero_freezes_it():
    model = ours(tiny())
    loads_LE = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    before = gates(model)[0].e_score_correction_bias.clone()
    update_router_bias(model, loads_LE, 0.0)
    assert torch.equal(gates(model)[0].e_score_correction_bias, before)
    update_router_bias(model, loads_LE, 0.001)
    change = gates(model)[0].e_score_correction_bias - before
    assert change.abs().max() > 5e-4 and abs(change.mean().item()) < 1e-7


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
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
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
