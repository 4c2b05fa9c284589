"""FP8 training: gradients of the products, which of a model's parts run so, and what a job makes of it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from shapes import ours, tiny, tokens
from test_engine import batch, loss_of
from tiny_runs import load_stage, tiny_run

from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError, NumericProblem
from r1pipe.model import DeepseekV3
from r1pipe.model.cache import Decoder
from r1pipe.model.kernels import meter, reference
from r1pipe.model.kernels.fp8 import FP8
from r1pipe.model.native import decoder_of
from r1pipe.model.training import compute_in, fp8_of
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

WHOLE = tiny(moe_intermediate_size=32, q_lora_rank=32, num_nextn_predict_layers=1)  # widths that FP8 takes


def fp8(power_of_two: bool = False) -> FP8:
    return FP8(reference, power_of_two)


@pytest.fixture
def exact(monkeypatch):
    """The reference without its rounding: scales of 1 and float32 values."""
    monkeypatch.setattr(reference, "FP8", torch.float32)
    monkeypatch.setattr(reference, "LARGEST", math.inf)
    monkeypatch.setattr(reference, "numbers", lambda values: values)
    monkeypatch.setattr(reference, "scale_of", lambda amax, power_of_two: torch.ones_like(amax))
    monkeypatch.setattr(meter.Meter, "counts", lambda *_: None)
    monkeypatch.setattr(meter.Meter, "record", lambda *_: None)


def gradients(model: DeepseekV3, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model.train(), rows).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 3])
def test_without_rounding_all_gradients_are_the_models_own(exact, rows):
    """Every path: projections, dense, shared and routed experts, some of which get no token."""
    model, text = ours(WHOLE), tokens(rows, 150, WHOLE)
    plain = gradients(model, text)
    compute_in(model, fp8())
    found = gradients(model, text)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        scale = gradient.norm().item() + 1e-12
        assert (found[name] - gradient).norm().item() / scale < 1e-4, name


def test_a_linears_three_products_are_those_of_quantised_operands():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70, 200, generator=generator).requires_grad_()
    weight = torch.randn(90, 200, generator=generator).requires_grad_()
    d_out = torch.randn(70, 90, generator=generator)
    out = fp8().linear(x, weight, "dense")
    out.backward(d_out)
    rounded = reference.dequantise
    x8, weight8 = (
        rounded(reference.quantise_tiles(x.detach())),
        rounded(reference.quantise_blocks(weight.detach())),
    )
    along_tokens = [rounded(reference.quantise_tiles(t.T.contiguous())) for t in (d_out, x8)]
    torch.testing.assert_close(out, x8 @ weight8.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        x.grad, rounded(reference.quantise_tiles(d_out)) @ weight8, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(weight.grad, along_tokens[0] @ along_tokens[1].T, atol=1e-4, rtol=1e-4)


def test_v3s_list_of_what_runs_in_fp8():
    model = ours(WHOLE)
    compute_in(model, fp8())
    converted = {name for name, module in model.named_modules() if getattr(module, "fp8", None)}
    attention = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    layers = [f"model.layers.{n}." for n in range(4)]  # the last predicts a further token
    assert converted == {
        *(f"{layer}self_attn.{name}" for layer in layers for name in attention),
        "model.layers.0.mlp",
        *(f"{layer}mlp.{part}" for layer in layers[1:] for part in ("experts", "shared_experts")),
    }
    compute_in(model, None)
    assert fp8_of(model) is None


def test_gradients_are_near_the_models_own():
    all_chosen = replace(WHOLE, num_experts_per_tok=16, n_group=1, topk_group=1)  # no choice can flip
    model, text = ours(all_chosen), tokens(3, 100, WHOLE)
    plain = gradients(model, text)
    compute_in(model, fp8())
    found = gradients(model, text)
    whole = [torch.cat([g.flatten() for g in of.values()]) for of in (found, plain)]
    assert 0.001 < (whole[0] - whole[1]).norm() / whole[1].norm() < 0.4


def test_scales_of_tiles_keep_what_one_scale_would_lose():
    """A token whose gradient is a millionth of its neighbour's."""
    x, weight = torch.ones(2, 16), torch.ones(16, 16)
    d_out = torch.tensor([[1.0], [1e-6]]).expand(2, 16)
    x.requires_grad_()
    fp8().linear(x, weight, "dense").backward(d_out)
    assert x.grad[1].tolist() == pytest.approx([16e-6] * 16, rel=0.07)


# --- the engine


def engine(level: int, moments: str = "fp32", **changes) -> Engine:
    config = replace(engine_config(1, level, "fp8"), moments=moments, **changes)
    return Engine(tiny_model(), OPTIM, ROUTER, config, total_steps=10)


def stepped(made: Engine) -> tuple[float, float]:
    stats = made.train_step([lambda: loss_of(made.module, batch())])
    return stats.loss, stats.grad_norm


@pytest.mark.slow
def test_zero_levels_and_recomputation_train_alike():
    expected = [stepped(made) for made in [engine(1)] for _ in range(3)]
    for level, changes in [(1, {"recompute": True}), (2, {}), (3, {"recompute": True})]:
        made = engine(level, **changes)
        found = [stepped(made) for _ in range(3)]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-6)
        assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-4)


@pytest.mark.parametrize("level", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_moments_in_bfloat16_survive_a_checkpoint_to_the_bit(level, tmp_path):
    made = engine(level, moments="bf16")
    for _ in range(2):
        stepped(made)
    made.save(tmp_path, {})
    expected = [stepped(made) for _ in range(2)]
    again = engine(level, moments="bf16")
    again.load(tmp_path)
    assert [stepped(again) for _ in range(2)] == expected


@pytest.mark.slow
def test_moments_in_bfloat16_learn_as_float32_does():
    kept = engine(1, moments="bf16")
    plain = engine(1)
    losses = [[stepped(made)[0] for _ in range(6)] for made in (kept, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]
    state = [
        value
        for of in kept._ds.optimizer.optimizer.state.values()
        for key, value in of.items()
        if key != "step"
    ]
    assert state and all(value.dtype == torch.bfloat16 for value in state)


@pytest.mark.slow
def test_micro_batches_add_up_in_float32():
    """In bfloat16, 300 times a three-hundredth of a gradient would be far from it."""
    whole, parts = engine(1), engine(1)
    stats = whole.train_step([lambda: loss_of(whole.module, batch())])
    many = parts.train_step([lambda: loss_of(parts.module, batch()) / 300] * 300)
    assert many.grad_norm == pytest.approx(stats.grad_norm, rel=0.01)


def test_what_quantising_did_is_told_by_kind_and_role():
    made = engine(1)
    stats = made.train_step([lambda: loss_of(made.module, batch())])
    names = {
        f"fp8/{kind}/{role}"
        for kind in ("attention", "dense", "experts", "shared")
        for role in ("activation", "weight", "gradient")
    }
    assert {name.rpartition("/")[0] for name in stats.fp8} == names
    for name in names:
        least = 1 / 128**2 if name.endswith("weight") else 1 / 128  # one in each block, or tile
        assert least <= stats.fp8[f"{name}/saturated"] < 0.2
        assert 0 <= stats.fp8[f"{name}/flushed"] < 0.01
        assert 0 < stats.fp8[f"{name}/scale_min"] <= stats.fp8[f"{name}/scale_max"] < 1


def test_ranks_counts_are_joined():
    one = {"experts/weight": meter.Totals(100, 4, 1, 0, 0.5, 2.0)}
    other = {
        "experts/weight": meter.Totals(300, 4, 0, 0, 0.25, 1.0),
        "dense/weight": meter.Totals(10, 1, 0, 0, 1.0, 1.0),
    }
    found = meter.metrics(meter.together([one, other]))
    assert found["fp8/experts/weight/saturated"] == 8 / 400
    assert found["fp8/experts/weight/flushed"] == 1 / 400
    assert (found["fp8/experts/weight/scale_min"], found["fp8/experts/weight/scale_max"]) == (0.25, 2.0)
    assert found["fp8/dense/weight/saturated"] == 0.1


def test_what_is_not_finite_stops_the_step_and_names_the_layers():
    broken = engine(1)
    with torch.no_grad():
        broken.module.model.layers[1].mlp.shared_experts.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericProblem, match=r"loss \(nan\).*shared_experts"):
        stepped(broken)
    made, boom = engine(1), 3e38

    def loss() -> torch.Tensor:
        """Fine itself; its gradient overflows on the way back."""
        value = loss_of(made.module, batch())
        return value + boom * (value - value.detach()) * 1e3

    with pytest.raises(NumericProblem, match=r"FP8: \d+ numbers of \w+ layers' gradients were not finite"):
        made.train_step([loss])


# --- sampling


@torch.no_grad()
def logits_of(decoder: Decoder, text: torch.Tensor) -> torch.Tensor:
    return decoder.prefill(text, torch.full((len(text),), text.shape[1]))[1]


def test_the_sampler_multiplies_as_the_trainer_does():
    """Log-probabilities of drawn tokens: near the trainer's own, further from unquantised ones."""
    model = ours(replace(WHOLE, num_nextn_predict_layers=0)).bfloat16()
    text = tokens(6, 8, WHOLE)
    compute_in(model, fp8())
    assert type(decoder_of(model)) is Decoder
    drawn = Batcher(model, eos_id=0).generate(text.tolist(), SamplingParams(24, ignore_eos=True, seed=1))
    sampled = torch.tensor([completion.logprobs for completion in drawn])

    def of_trainer() -> torch.Tensor:
        rows = torch.cat([text, torch.tensor([completion.tokens for completion in drawn])], dim=1)
        logprobs = model.train()(rows[:, :-1]).float().log_softmax(-1)
        return logprobs.gather(2, rows[:, 1:, None]).squeeze(2)[:, -24:].detach()

    gap = (of_trainer() - sampled).abs().mean()
    compute_in(model, None)
    plain = (of_trainer() - sampled).abs().mean()
    assert gap < 0.67 * plain


def test_weights_are_quantised_once_per_generation(monkeypatch):
    model = ours(replace(WHOLE, num_nextn_predict_layers=0)).bfloat16()
    how = fp8()
    compute_in(model, how)
    calls: list[int] = []
    once = reference.quantise_blocks
    monkeypatch.setattr(reference, "quantise_blocks", lambda *a, **k: calls.append(1) or once(*a, **k))
    Batcher(model, eos_id=0).generate(tokens(2, 5, WHOLE).tolist(), SamplingParams(10, ignore_eos=True))
    assert (
        len(calls) == 3 * 5 + 2 + 2 * 4
    )  # attention's; a dense layer's two; two layers of experts and shared
    assert how._cache is None


# --- jobs


def test_grpo_runs_in_fp8(tmp_path):
    widths = ("model.qk_rope_head_dim=16", "stage.max_steps=1")
    grpo = tiny_run(tmp_path / "grpo", "stage=grpo", "precision=fp8", *widths)
    load_stage("grpo").main(str(grpo))
    [row] = [json.loads(line) for line in (grpo / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(row["train/loss"]) and row["sampling/sampling_logp_difference/mean"] < 0.05
    assert row["fp8/experts/gradient/saturated"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["precision=fp8", "model.moe_intermediate_size=40"],
            "model.moe_intermediate_size = 40 is no multiple",
        ),
        (
            ["precision=fp8", "model.v_head_dim=9"],
            "num_attention_heads x .*v_head_dim.* is no multiple of 16",
        ),
        (["precision=fp8", "engine.accelerator=cuda", "engine.graphs=true"], "graphs=true needs .*bf16"),
        (["engine.precision=fp8", "engine.zero_level=0"], "engine.precision=fp8 needs engine.zero_level=1"),
        (["precision=fp16"], "engine.precision=fp16 is none of fp32, bf16, fp8"),
        (["kernels=cutlass"], "engine.kernels=cutlass is none of auto, triton"),
        (["engine.moments=fp8"], "engine.moments=fp8 is none of fp32, bf16"),
    ],
)
def test_what_cannot_be_is_refused_when_composed(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        compose(["stage=grpo", *overrides])
    assert "\n" not in str(error.value)


def test_one_switch_takes_the_masters_along():
    config = compose(["stage=cold_start", "precision=fp8", "kernels=reference"]).config.engine
    assert (config.precision, config.zero_level, config.kernels) == ("fp8", 1, "reference")
    assert compose(["stage=grpo", "precision=fp8", "engine.zero_level=3"]).config.engine.zero_level == 3
    assert compose(["stage=grpo", "precision=fp8", "engine=cluster"]).config.engine.zero_level == 3
    assert compose(["stage=grpo", "precision=fp32"]).config.engine.zero_level == 0
