"""Routing replay (R3): the trainer goes through the sampler's experts, with weights from its own scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, on_two_ranks
from rl_runs import go, go_killed_and_resumed, metrics_of, objective
from shapes import SHAPES, V2_SHAPES, ours, tiny
from tiny_runs import tiny_run

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Completion
from r1pipe.model import DeepseekV3, set_recompute
from r1pipe.model.kernels import training as kernels
from r1pipe.model.moe import Balance, Gate, MoE, Routing, expert_loads, reset_loads
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.batch import Rollout, collate
from r1pipe.train.rl.routing import check_recorded
from r1pipe.train.rl.update import balances_of, completion_logprobs, update

CPU = torch.device("cpu")
CONFIG = tiny()


def slow_moe(moe: MoE, x_ND: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
    """The reference: token by token, expert by expert; weights from live scores, as the model takes them."""
    config, rows = moe.config, []
    for x_D, experts_K in zip(x_ND, experts_NK.tolist(), strict=True):
        logits_E = torch.stack([(x_D.float() * row_D.float()).sum() for row_D in moe.gate.weight])
        scores_E = logits_E.sigmoid() if config.scoring_func == "sigmoid" else logits_E.softmax(dim=0)
        total = sum(scores_E[e] for e in experts_K) + 1e-20 if config.norm_topk_prob else 1.0
        out_D = moe.shared_experts(x_D[None])[0]
        for e in experts_K:
            gate_I, up_I = (moe.experts.gate_up_proj[e] @ x_D).chunk(2)
            inner_I = torch.nn.functional.silu(gate_I) * up_I
            weight = scores_E[e] / total * config.routed_scaling_factor
            out_D = out_D + weight * (moe.experts.down_proj[e] @ inner_I)
        rows.append(out_D)
    return torch.stack(rows)


def random_experts(count: int, config) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.rand(count, config.n_routed_experts, generator=generator)
        .topk(config.num_experts_per_tok)
        .indices
    )


@pytest.mark.parametrize(
    "config", [CONFIG, SHAPES["few_experts"], V2_SHAPES["v2"]], ids=["v3", "few", "softmax"]
)
@pytest.mark.parametrize("compiled", [True, False])
def test_output_and_gradients_are_the_slow_ones(config, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "usable", lambda *_, **__: False)
    moe = ours(config).train().model.layers[-1].mlp
    x_ND = torch.randn(11, config.hidden_size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    experts_NK, direction = random_experts(11, config), torch.linspace(-1, 1, config.hidden_size)
    found = []
    for run in (lambda: moe(x_ND, Routing(replayed_NK=experts_NK)), lambda: slow_moe(moe, x_ND, experts_NK)):
        moe.zero_grad()
        x_ND.grad = None
        out_ND = run()
        (out_ND @ direction).square().sum().backward()
        gradients = {name: weight.grad.clone() for name, weight in moe.named_parameters()}
        found.append({"out": out_ND.detach(), "x": x_ND.grad, **gradients})
    assert found[1]["gate.weight"].abs().max() > 1e-3, "the router must learn"
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, atol=2e-4, rtol=2e-3, msg=name)


def rollouts(model: DeepseekV3, replayed: bool = True) -> list[Rollout]:
    """Ragged completions of two prompts, with experts at random, which the model would not choose."""
    config, made = model.config, []
    layers = config.num_hidden_layers - config.first_k_dense_replace
    for seed, (prompt, length) in enumerate([([5, 6, 7], 6), ([5, 6, 7], 3), ([9], 1), ([9], 7)]):
        chosen = random_experts(length * layers, config).view(length, layers, -1).roll(seed, 0).numpy()
        completion = Completion(list(range(10, 10 + length)), [-1.0] * length, "stop")
        completion.experts = chosen.astype(np.int16) if replayed else None
        made.append(Rollout(prompt, completion, 1.0 - seed, True))
    return made


def one_by_one(model: DeepseekV3, rollout: Rollout) -> torch.Tensor:
    """The reference for packing: one completion as a whole row of its own, with nothing shared."""
    prompt, answer = rollout.prompt, rollout.completion.tokens
    row = torch.tensor([[*prompt, *answer[:-1]]])
    replayed = torch.from_numpy(rollout.completion.experts.astype(np.int64)).transpose(0, 1)
    own: list[torch.Tensor] = []

    def gate(module: Gate, inputs: tuple) -> None:  # the prompt's tokens but the last choose by themselves
        x_ND, routing = inputs
        chosen = module._choose(module._scores(x_ND.float(), module.weight.float()).detach())
        own.append(chosen)
        routing.experts_NK = torch.cat([chosen[: len(prompt) - 1], replayed[len(own) - 1]])

    gates = [module for module in model.modules() if isinstance(module, Gate)]
    hooks = [module.register_forward_pre_hook(gate) for module in gates]
    logits_TV = model(row)[0, len(prompt) - 1 :]
    for hook in hooks:
        hook.remove()
    return logits_TV.log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prompts_padding_and_recomputation(recompute):
    model = ours(CONFIG).train()
    set_recompute(model, recompute)
    rows = rollouts(model)
    micro = collate(rows, [1.0] * len(rows), 0.0, CPU)
    reset_loads(model)
    logprobs_N = completion_logprobs(model, micro, 1.0, balances_of(micro, False, replay=True))
    logprobs_N.sum().backward()
    expected_N = torch.cat([one_by_one(model, row) for row in rows])
    torch.testing.assert_close(logprobs_N, expected_N, atol=1e-4, rtol=0)
    live_N = completion_logprobs(model, micro, 1.0)
    assert (live_N - logprobs_N).abs().max() > 0.1, "the experts must be others than the model's own"


def test_loads_count_the_experts_that_were_used():
    model = ours(CONFIG).train()
    rows = rollouts(model)
    micro = collate(rows, [1.0] * len(rows), 0.0, CPU)
    reset_loads(model)
    completion_logprobs(model, micro, 1.0, balances_of(micro, False, replay=True))
    counted_LE = expert_loads(model)
    reset_loads(model)
    nothing = torch.zeros(len(micro.tokens_BT), dtype=torch.long)
    balances = balances_of(micro, False)[0], Balance.of_lengths(nothing, micro.tokens_BT.shape[1], False)
    completion_logprobs(model, micro, 1.0, balances)
    of_prompts_LE = expert_loads(model)
    chosen = np.concatenate([row.completion.experts for row in rows])  # [tokens, L, K]
    experts = CONFIG.n_routed_experts
    expected = [
        np.bincount(chosen[:, layer].flatten(), minlength=experts) for layer in range(chosen.shape[1])
    ]
    assert torch.equal(counted_LE - of_prompts_LE, torch.tensor(np.stack(expected)).float())


@pytest.mark.parametrize("replay, cap", [(True, 0.0), (True, 2.0), (False, 2.0)])
def test_the_update_replays_in_every_pass_of_the_trainer(replay, cap):
    """On the first step the trainer's log-probabilities are those of the loss: the ratio is exactly 1."""
    engine = Engine(ours(CONFIG), OPTIM, ROUTER, engine_config(), total_steps=10)
    correction = {"importance": "token_truncate", "importance_cap": cap} if cap else {}
    stage = replace(objective(**correction), replay_routing=replay, minibatches=1, inner_epochs=1)
    rows = rollouts(engine.module)
    with torch.no_grad():
        micro = collate(rows, None, 0.0, CPU)
        replayed_N = completion_logprobs(engine.module, micro, 1.0, balances_of(micro, False, replay=True))
        own_N = completion_logprobs(engine.module, micro, 1.0)
    for row, logprobs_T in zip(rows, replayed_N.split(micro.lengths_B.tolist()), strict=True):
        row.completion.logprobs = logprobs_T.tolist()
    metrics = update(engine, rows, stage, None)
    gap = metrics["sampling/sampling_logp_difference/mean"]
    assert gap == pytest.approx(0 if replay else float((own_N - replayed_N).abs().mean()), abs=1e-5)
    if cap:
        assert metrics["importance_ratio/mean"] == pytest.approx(1, abs=1e-5)


REPLAYED = ["stage=grpo", "stage.max_steps=2", "stage.sampling.max_tokens=12", "stage.replay_routing=true"]


def test_a_run_with_a_sampler_of_another_precision(tmp_path):
    """Resume has nothing to restore: the choices live as long as their step."""
    words = [*REPLAYED, "engine.sampler_precision=bf16", "stage.save_every=1"]
    whole = tiny_run(tmp_path / "whole", *words)
    go(whole)
    monkeypatch = pytest.MonkeyPatch()
    parts = tiny_run(tmp_path / "parts", *words)
    go_killed_and_resumed(parts, "step-1", monkeypatch)
    assert metrics_of(parts) == metrics_of(whole)


def test_what_a_sampler_does_not_record_or_records_of_another_model_is_refused():
    right = rollouts(ours(CONFIG))[0].completion
    check_recorded([right], CONFIG)
    with pytest.raises(EnvironmentProblem, match="returned completions without their experts"):
        check_recorded([right, Completion([1], [0.0], "stop")], CONFIG)
    for wrong in (right.experts[:, :1], right.experts[1:], right.experts + 16):
        with pytest.raises(EnvironmentProblem, match="this model needs"):
            check_recorded([replace(right, experts=wrong)], CONFIG)


@pytest.mark.slow
def test_two_ranks_at_every_zero_level(tmp_path):
    found = on_two_ranks("two_ranks_replay.py", tmp_path)
    for level in ("1", "2", "3"):
        assert found[level] == pytest.approx(found["0"], rel=1e-4), level
    assert found["live"][0] != pytest.approx(found["0"][0], rel=1e-2)
