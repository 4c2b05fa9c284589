"""The mixture of experts: no token dropped, balancing by bias and by loss, choices kept by recomputation."""

import torch
from shapes import SHAPES, ours, tiny, tokens
from torch.utils.checkpoint import checkpoint

from r1pipe.model import expert_loads, max_vio, reset_loads, update_router_bias
from r1pipe.model.moe import Experts, gates


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
