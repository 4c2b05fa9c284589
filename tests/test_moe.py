"""The mixture of experts: no token dropped, balancing by bias and by loss, choices kept by recomputation."""

import pytest
import torch
from shapes import SHAPES, ours, tiny, tokens
from torch.utils.checkpoint import checkpoint

from r1pipe.model import (
    Balance,
    expert_loads,
    max_vio,
    reset_loads,
    set_recompute,
    update_router_bias,
)
from r1pipe.model import recompute as again
from r1pipe.model.moe import Experts, Gate, gates, sequence_balance


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


def test_padding_counts_in_no_load():
    model = ours(tiny(num_nextn_predict_layers=1)).train()
    tokens_BT = tokens(2, 12, model.config)

    def loads_of(rows_BT, numbers_BT):
        reset_loads(model)
        model.model.mtp_hidden(model.hidden(rows_BT, numbers_BT), rows_BT, numbers_BT)
        return expert_loads(model)

    whole_LE = loads_of(tokens_BT, SEGMENTS)
    alone = [
        loads_of(tokens_BT[row : row + 1, start:end], torch.ones(1, end - start, dtype=torch.long))
        for row, start, end in ((0, 0, 5), (0, 5, 12), (1, 0, 9))
    ]
    assert torch.equal(whole_LE, sum(alone))
    # 21 tokens of three documents, of which the MTP layer reads all but each last one; four experts a token
    assert whole_LE.sum(dim=-1).tolist() == [21 * 4, 21 * 4, 18 * 4]


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
    before, chosen, _ = gate(x_ND)
    gate.e_score_correction_bias.fill_(-3.0)  # a common offset
    after, same, _ = gate(x_ND)
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


def test_no_token_is_dropped_even_if_all_want_the_same_experts():
    """Counted, in training; and in inference every token gets its experts' whole output (test above)."""
    model = ours(SHAPES["v3"]).train()
    for gate in gates(model):
        gate.e_score_correction_bias[:4] += 100.0  # one group's four experts take every token
    tokens_BT = tokens(3, 50, model.config)
    model(tokens_BT)
    loads_LE = expert_loads(model)
    assert loads_LE[:, :4].tolist() == [[150.0] * 4] * 2 and loads_LE[:, 4:].sum() == 0


def test_sequence_balance_by_hand():
    """V3 equations 17 to 20 on two documents of two tokens and one, with a token of padding; E=4, K=2."""
    scores_NE = torch.tensor(
        [[0.4, 0.4, 0.1, 0.1], [0.9, 0.1, 0.3, 0.7], [0.1, 0.2, 0.3, 0.4], [9.0, 1, 1, 1]]
    )
    documents_N = torch.tensor([1, 1, 2, 0])
    # document 1: experts 0, 1 and 0, 3: f = 4/(2x2) x (2,1,0,1); P = ((.4+.45)/2, (.4+.05)/2, .., (.1+.35)/2)
    first = 2 * 0.425 + 1 * 0.225 + 1 * 0.225
    # document 2: experts 2, 3: f = 4/(2x1) x (0,0,1,1); P = (.1,.2,.3,.4)
    second = 2 * 0.3 + 2 * 0.4
    total = sequence_balance(scores_NE, documents_N, 2)
    torch.testing.assert_close(total, torch.tensor(2 * first + 1 * second))
    even = torch.full((6, 4), 0.5)
    torch.testing.assert_close(sequence_balance(even, torch.tensor([1, 1, 1, 2, 2, 2]), 2), torch.tensor(6.0))
    assert sequence_balance(scores_NE, torch.zeros(4, dtype=torch.long), 2) == 0


def test_sequence_balance_pushes_scores_away_from_crowded_experts():
    scores_NE = torch.tensor([[0.8, 0.6, 0.1, 0.2]] * 3, requires_grad=True)
    sequence_balance(scores_NE, torch.tensor([1, 1, 1]), 2).backward()
    assert (scores_NE.grad[:, :2] > 0).all() and (scores_NE.grad[:, 2:] < 0).all()


def test_balance_of_packed_rows_is_the_sum_over_documents_and_layers():
    model = ours(SHAPES["v3"])
    tokens_BT = tokens(2, 12, model.config)
    segments_BT = torch.tensor([[1] * 5 + [2] * 7, [1] * 4 + [2] * 6 + [0] * 2])

    def total(rows_BT, numbers_BT):
        balance = Balance(numbers_BT, with_loss=True)
        model.hidden(rows_BT, numbers_BT, balance)
        return balance.total().item()

    alone = [
        total(tokens_BT[row : row + 1, start:end], torch.ones(1, end - start, dtype=torch.long))
        for row, start, end in ((0, 0, 5), (0, 5, 12), (1, 0, 4), (1, 4, 10))
    ]
    whole = total(tokens_BT, segments_BT)
    assert whole == pytest.approx(sum(alone), rel=1e-5)
    assert whole > 2 * 22  # 1 a token and layer is perfect balance


class Jittery(Gate):
    """A router that would choose otherwise each time, as rounding does now and then."""

    calls = 0

    def _choose(self, scores_NE):
        Jittery.calls += 1
        noise = torch.rand(scores_NE.shape, generator=torch.Generator().manual_seed(Jittery.calls))
        return super()._choose(scores_NE + noise)


@pytest.mark.parametrize(
    ("way", "read_L"),
    [("packed", [21, 21, 0]), ("after prompts", [29, 29, 0]), ("mtp and balance", [21, 21, 18])],
)
def test_recomputation_keeps_choices_counts_once_and_changes_no_gradient(way, read_L):
    found = []
    for how in ((False,), (True,), (True, True)):
        model = ours(tiny(num_nextn_predict_layers=1)).train()
        set_recompute(model, *how)
        Jittery.calls = 0
        for gate in gates(model):
            gate.__class__ = Jittery
        loss = {"packed": packed_loss, "after prompts": loss_after_prompts, "mtp and balance": whole_loss}[
            way
        ](model)
        calls, loads_LE = Jittery.calls, expert_loads(model)
        assert loads_LE.sum(dim=-1).tolist() == [4 * read for read in read_L]
        loss.backward()
        assert Jittery.calls == calls and torch.equal(expert_loads(model), loads_LE)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), loads_LE, grads))
    (loss, loads_LE, grads), *others = found
    for same, same_LE, recomputed in others:
        assert same == loss and torch.equal(same_LE, loads_LE) and grads.keys() == recomputed.keys()
        for name, gradient in grads.items():
            torch.testing.assert_close(recomputed[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_of_halves_of_layers_the_inputs_alone_wait_on_the_host(monkeypatch):
    """Not the mask and the rotations, which all layers share."""
    sent: list[torch.Size] = []

    def noted(pin_memory: bool):
        return torch.autograd.graph.saved_tensors_hooks(lambda t: sent.append(t.shape) or t, lambda t: t)

    monkeypatch.setattr(again, "save_on_cpu", noted)
    model = ours(tiny()).train()
    set_recompute(model, True, offload=True)
    packed_loss(model).backward()
    assert len(sent) == 2 * 3 and set(sent) == {sent[0]} and sent[0][-1] == 64


SEGMENTS = torch.tensor([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])


def packed_loss(model):
    return model(tokens(2, 12, model.config), SEGMENTS).square().mean()


def loss_after_prompts(model):
    """As an RL update reads: prompts once, rows that go on from their cache entries."""
    prompts_PT, rows_BT = tokens(2, 6, model.config), tokens(4, 7, model.config)
    lengths = ([6, 4], [7, 5, 6, 1])
    balances = [Balance.of_lengths(torch.tensor(each), max(each), with_loss=True) for each in lengths]
    hidden_BTD = model.model.after_prompts(
        prompts_PT, torch.tensor([6, 4]), rows_BT, torch.tensor([0, 0, 1, 1]), balances
    )
    return hidden_BTD.square().mean() + 0.01 * (balances[0].total() + balances[1].total())


def whole_loss(model):
    tokens_BT = tokens(2, 12, model.config)
    balance = Balance(SEGMENTS, with_loss=True)
    hidden_BTD = model.hidden(tokens_BT, SEGMENTS, balance)
    (further_BTD,) = model.model.mtp_hidden(hidden_BTD, tokens_BT, SEGMENTS, balance)
    return hidden_BTD.square().mean() + further_BTD.square().mean() + 0.01 * balance.total()


def test_recomputation_keeps_less_in_memory():
    kept = []
    for recompute in (False, True):
        model = ours(SHAPES["v3"]).train()
        set_recompute(model, recompute)
        sizes: list[int] = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.hidden(tokens(4, 64, model.config))
        kept.append(sum(sizes))
    assert kept[1] < 0.2 * kept[0]
