"""What a GPU makes faster, on a CPU: FlexAttention, compiled layers, and decoding by replayed steps."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from shapes import SHAPES, ours, tiny, tokens
from test_rollout import EOS, PAD, SMALL, prompts

from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError
from r1pipe.model import Balance, expert_loads, train_as
from r1pipe.model.cache import Decoder, GraphDecoder
from r1pipe.model.training import compile_layers, set_attention
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout import batching as sampler
from r1pipe.train.rollout.batching import Batcher

SEGMENTS = torch.tensor([[1] * 7 + [2] * 9 + [0] * 4, [1] * 20])


@pytest.fixture
def cpu_gradients(monkeypatch):
    """torch refuses FlexAttention's gradients on CPUs, where no fused kernel has them; its plain one does."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


def causal(model):
    return model(tokens(2, 20, model.config))


def documents(model):
    """Two documents in a row and padding; the balance loss, and the layer that predicts further."""
    balance, tokens_BT = Balance(SEGMENTS, with_loss=True), tokens(2, 20, model.config)
    hidden_BTD = model.hidden(tokens_BT, SEGMENTS, balance)
    further = [depth.mean() for depth in model.model.mtp_hidden(hidden_BTD, tokens_BT, SEGMENTS)]
    return model.lm_head(hidden_BTD) + balance.total() + sum(further)


def past(model):
    """Three rows that go on from two prompts of unequal length."""
    lengths, width = torch.tensor([3, 5]), 6
    balances = (
        Balance.of_lengths(lengths, width, True),
        Balance.of_lengths(torch.tensor([9, 4, 9]), 9, True),
    )
    prompts_PT, rows_BT = tokens(2, width, model.config), tokens(3, 9, model.config)
    hidden_BTD = model.model.after_prompts(prompts_PT, lengths, rows_BT, torch.tensor([0, 0, 1]), balances)
    return model.lm_head(hidden_BTD) + sum(balance.total() for balance in balances)


def assert_trains_alike(model, reference, run):
    """Logits, gradients and the experts' loads of a training pass."""
    found, expected = run(model.train()), run(reference.train())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for each in (found, expected):
        each.sin().mean().backward()
    assert torch.equal(expert_loads(model), expert_loads(reference))
    grads = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("run", [causal, documents, past])
@pytest.mark.parametrize("shape", ["v3", "v2_lite_like"])
def test_flex_attention_equals_sdpa(run, shape, cpu_gradients):
    changes = {} if shape == "v3" else {"q_lora_rank": None, "v_head_dim": 32}
    config = tiny(num_hidden_layers=2, num_nextn_predict_layers=1, **changes)
    model, reference = ours(config), ours(config)
    set_attention(model, "flex")
    assert_trains_alike(model, reference, run)


def test_flex_attention_is_of_training_passes_alone(monkeypatch):
    """The sampler and frozen models run without it."""
    monkeypatch.setattr("r1pipe.model.mla.flex_attention", None)
    model = ours(SHAPES["v3"])
    set_attention(model, "flex")
    with pytest.raises(TypeError):
        causal(model)
    with torch.no_grad():
        causal(model)
    causal(model.eval())


def test_the_engines_switches_reach_the_model():
    model = ours(SHAPES["v3"])
    config = replace(engine_config(), attention="flex", compile=True, recompute=False)
    train_as(model, config, torch.device("cpu"))
    assert model.model.flex and model.model.compiled is not None and not model.model.recompute
    plain = ours(SHAPES["v3"])
    train_as(
        plain,
        replace(config, attention="sdpa", compile=False, recompute=True),
        torch.device("cpu"),
    )
    assert not plain.model.flex and plain.model.compiled is None and plain.model.recompute


def grouped_mm(x_ND, weights_EDI, *, offs):
    """F.grouped_mm, token by token: the compiler knows torch's own in bfloat16 alone."""
    experts_N = torch.searchsorted(offs, torch.arange(len(x_ND), dtype=offs.dtype), right=True)
    return torch.bmm(x_ND.unsqueeze(1), weights_EDI.index_select(0, experts_N)).squeeze(1)


@pytest.mark.parametrize(
    "run, attention", [(documents, "sdpa"), pytest.param(past, "flex", marks=pytest.mark.slow)]
)
def test_compiled_layers_train_alike_in_one_graph(run, attention, cpu_gradients, monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    config = tiny(num_hidden_layers=2, num_nextn_predict_layers=int(run is documents))
    model, reference = ours(config), ours(config)
    set_attention(model, attention)
    compile_layers(model, backend="aot_eager", fullgraph=True)  # without code generation, which takes minutes
    assert_trains_alike(model, reference, run)


def replayed(step):
    """Stands in for a CUDA graph: runs the step again on the tensors that it was captured with."""
    captures.append(step)
    logits_SV = step().clone()
    return lambda: logits_SV.copy_(step()), logits_SV


captures: list = []


@pytest.mark.parametrize("slots", [5, 16])
@pytest.mark.parametrize("rounded", [1, 8, 128])
def test_replayed_steps_draw_the_same_tokens(slots, rounded, monkeypatch):
    """Ragged completions: slots are refilled, and in the end halved; 16 slots hold all from the start."""
    model = ours(SMALL)
    asked, params = prompts(7, SMALL), SamplingParams(max_tokens=24, n=2, seed=5)
    made: list[GraphDecoder] = []

    def decoder(model, graphs):
        assert graphs
        made.append(GraphDecoder(model, replayed))
        return made[-1]

    monkeypatch.setattr(sampler, "decoder_of", lambda model, graphs: Decoder(model))
    expected = Batcher(model, EOS, PAD, slots).generate(asked, params)
    assert len({len(completion.tokens) for completion in expected}) > 3, "completions must be ragged"
    monkeypatch.setattr("r1pipe.model.cache.LENGTHS", rounded)
    monkeypatch.setattr(sampler, "decoder_of", decoder)
    captures.clear()
    found = Batcher(model, EOS, PAD, slots, graphs=True).generate(asked, params)
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    sizes = {len(step.args[0]) for step in captures}
    assert len(sizes) > 1 and sizes <= {14, 7, 5, 3, 2, 1}
    lengths = 1 + (9 + 24) // rounded
    assert len(captures) <= len(sizes) * lengths and len(made) == 1


def test_slots_are_halved_and_hold_what_is_left():
    decoder = GraphDecoder(ours(SHAPES["v3"]), replayed)
    assert [decoder.slots_for(live, 256) for live in (256, 129, 128, 65, 3, 1)] == [256, 256, 128, 128, 4, 1]
    assert [decoder.slots_for(live, 5) for live in (5, 3, 2, 1)] == [5, 5, 2, 1]


@pytest.mark.parametrize("wish", ["attention=flex", "compile=true", "graphs=true"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(wish, monkeypatch):
    with pytest.raises(ConfigError, match=f"engine.{wish} needs a GPU"):
        compose(["stage=grpo", "engine=cpu", f"engine.{wish}"])
    name, _, value = wish.partition("=")
    config = replace(engine_config(), accelerator="auto", **{name: value if value == "flex" else True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"engine.{wish} needs a GPU"):
        Engine(tiny_model(), OPTIM, ROUTER, config, total_steps=1)


def test_graphs_are_refused_where_the_model_cannot_be_captured():
    with pytest.raises(ConfigError, match=r"engine.graphs=true needs a GPU; this model is on the cpu"):
        Batcher(ours(SHAPES["v3"]), graphs=True).generate([[5]], SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"engine.recompute": "true"}, "engine.recompute=false"),
        ({"engine.zero_level": "3"}, "engine.zero_level=2"),
        ({"engine.precision": "fp32"}, "engine.precision=bf16"),
    ],
)
def test_what_compiled_layers_do_not_go_with(changes, said):
    given = {"engine.compile": "true", "engine.recompute": "false", **changes}
    with pytest.raises(ConfigError, match=f"engine.compile=true needs {said}"):
        compose(["stage=grpo", "engine=gpu", *(f"{key}={value}" for key, value in given.items())])
