"""What is not finite: the step is skipped, too many in a row stop the job with the layer's name."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model, write_run
from rl_runs import go
from test_engine import batch, loss_of
from tiny_runs import tiny_run

from r1pipe.chat.template import Chat
from r1pipe.core.errors import NumericProblem
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Demonstration, Prompt
from r1pipe.model import DeepseekV3
from r1pipe.model.finite import first_non_finite
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.metrics import step_metrics
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.run import open_run
from r1pipe.train.sft.loop import epochs_of, pack_demonstrations, train

LAYER = "model.layers.1.mlp"


def broken(part: str = f"{LAYER}.shared_experts.down_proj", value: float = math.nan) -> DeepseekV3:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(part).weight[3, 2] = value
    return model


@pytest.mark.parametrize(
    "part", ["model.embed_tokens", "model.layers.0.self_attn.o_proj", f"{LAYER}.gate", "model.norm"]
)
def test_the_first_broken_module_is_named(part):
    model = broken(part) if part != "model.norm" else tiny_model()
    if part == "model.norm":
        model.model.norm.weight.data[0] = math.inf
    rows = torch.arange(1152).unsqueeze(0)[:, :300]
    if part == "model.embed_tokens":
        assert first_non_finite(model, lambda: model(rows[:, 10:])) is None  # the broken row is not read
    assert first_non_finite(model, lambda: model(rows)) == part
    assert first_non_finite(tiny_model(), lambda: None) is None


@pytest.mark.parametrize("level", [0, 3])
def test_training_stops_before_the_weights_move(level):
    engine = Engine(broken(), OPTIM, ROUTER, engine_config(1, level), total_steps=10)
    with engine.gathered() as model:
        before = model.lm_head.weight.clone()
    with pytest.raises(NumericProblem, match=rf"loss \(nan\).* {LAYER}.*shared_experts") as error:
        engine.train_step([lambda: loss_of(engine.module, batch())])
    assert "\n" not in str(error.value)
    with engine.gathered() as model:
        assert torch.equal(model.lm_head.weight, before)


def test_a_loss_that_breaks_behind_the_model_is_told_apart():
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(), total_steps=10)
    with pytest.raises(NumericProblem, match="every layer's output is"):
        engine.train_step([lambda: loss_of(engine.module, batch()) * math.inf])


def test_a_gradient_that_is_not_finite_stops_the_step():
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(), total_steps=10)
    with pytest.raises(NumericProblem, match=r"gradient is not finite while the loss is.* output of lm_head"):
        engine.train_step([lambda: overflowing(engine)])


def overflowing(engine) -> torch.Tensor:
    """A loss of zero whose gradient is 0 x infinity."""
    return (loss_of(engine.module, batch()) * 0).sqrt()


def infinite(engine) -> torch.Tensor:
    """An infinite loss whose gradient would be finite."""
    return loss_of(engine.module, batch()) + math.inf


@pytest.mark.parametrize(("level", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
@pytest.mark.parametrize("breaks", [overflowing, infinite])
def test_a_step_that_is_skipped_leaves_no_trace(level, precision, breaks, caplog):
    """Weights, moments, schedule and biases are those of a run that never saw the step."""

    def good() -> torch.Tensor:
        return loss_of(engine.module, batch())

    losses = {}
    for broken in (0, 2):
        optim = replace(OPTIM, max_skipped=2)
        engine = Engine(tiny_model(), optim, ROUTER, engine_config(1, level, precision), total_steps=10)
        stats = [engine.train_step([good])]
        for number in range(broken):
            skipped = engine.train_step([good, partial(breaks, engine)])
            assert skipped.broken and skipped.skipped == number + 1 == engine.skipped_in_a_row
            assert step_metrics(skipped) == {"train/lr": skipped.lr, "train/skipped": number + 1.0}
            assert skipped.lr == pytest.approx(OPTIM.lr)  # of the second step, which it would have been
        stats += [engine.train_step([good]) for _ in range(2)]
        assert engine.skipped_in_a_row == 0 and not stats[-1].broken
        bias_E = engine.module.model.layers[1].mlp.gate.e_score_correction_bias.tolist()
        losses[broken] = [s.loss for s in stats], [s.lr for s in stats], [s.grad_norm for s in stats], bias_E
    assert losses[0] == losses[2]
    told = [record.message for record in caplog.records if record.name == "r1pipe"]
    assert len(told) == 2 and "a step is skipped, number 2 in a row" in told[1]


def test_how_many_were_skipped_outlives_an_interruption(tmp_path):
    def engine() -> Engine:
        return Engine(tiny_model(), replace(OPTIM, max_skipped=2), ROUTER, engine_config(), total_steps=10)

    first, second = engine(), engine()
    for _ in range(2):
        first.train_step([partial(overflowing, first)])
    first.save(tmp_path / "engine", {})
    second.load(tmp_path / "engine")
    with pytest.raises(
        NumericProblem, match=r"steps not finite in a row: 3, above stage\.optim\.max_skipped=2"
    ):
        second.train_step([partial(overflowing, second)])
    assert second._ds.skipped_steps == 3


def test_a_stage_of_reinforcement_passes_over_a_broken_minibatch(tmp_path, monkeypatch):
    """One minibatch of two: the step's numbers are the other's, none of them is a NaN, and the run ends."""
    steps, real = [], Engine.train_step

    def train_step(engine, closures):
        steps.append(engine)
        first = closures[0]
        return real(engine, [lambda: first() * math.nan] if len(steps) == 3 else closures)

    monkeypatch.setattr(Engine, "train_step", train_step)
    folder = tiny_run(tmp_path / "run", "stage=grpo", "stage.max_steps=3", "stage.minibatches=2")
    go(folder)
    assert (folder / "record.json").exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("train/skipped") for row in rows] == [None, 1.0, 1.0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "sampling/sampling_logp_difference/mean" not in rows[1] and "train/grad_norm" in rows[1]
    said = [json.loads(line).get("say", "") for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert sum("a step is skipped" in line for line in said) == 1


def test_the_job_ends_past_the_limit_with_one_line_and_exit_code_2(tmp_path):
    chat = Chat.load(content_dir() / "tokenizer")
    settings = ("stage.save_every=1", "stage.eval.every=0", "stage.optim.max_skipped=1")
    folder = write_run(tmp_path / "run", tiny("cold_start", *settings))
    demonstrations = [
        Demonstration(Prompt(str(i), "word", "en", f"{i}?"), f"<think>\n{i}\n</think>\n\n{i}")
        for i in range(9)
    ]
    with pytest.raises(SystemExit) as end, open_run(folder) as run:
        rows = pack_demonstrations(chat, demonstrations, 64)
        engine = Engine(broken(), run.stage.optim, run.stage.router, engine_config(), 2)
        run.chat = chat
        train(run, engine, epochs_of(run, rows, 2), 2)
    assert end.value.code == 2
    told = (folder / "error.txt").read_text()
    assert LAYER in told and told.count("\n") == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [
        "step-1"
    ]  # of weights that stood still
    logged = json.loads((folder / "metrics.jsonl").read_text())
    assert logged["train/skipped"] == 1 and "train/loss" not in logged


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.9}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sampling_names_the_layer_too(params, value):
    sampler = Batcher(broken(value=value), eos_id=2, pad_id=0)
    with pytest.raises(NumericProblem, match=LAYER) as error:
        sampler.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=4, n=2, **params))
    assert "\n" not in str(error.value)


def test_finite_steps_hook_nothing():
    model = tiny_model()
    engine = Engine(model, OPTIM, None, engine_config(), total_steps=10)
    before = sum(len(module._forward_hooks) for module in model.modules())
    engine.train_step([partial(loss_of, model, batch())])
    assert sum(len(module._forward_hooks) for module in model.modules()) == before
