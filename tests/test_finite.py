"""What is not finite stops a job with the layer's name: in training, in sampling, and nothing is saved."""

import math
from functools import partial

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model, write_run
from test_engine import batch, loss_of

from r1pipe.data.chat import Chat
from r1pipe.engine import Engine
from r1pipe.errors import NumericProblem
from r1pipe.model import DeepseekV3
from r1pipe.model.finite import first_non_finite
from r1pipe.paths import content_dir
from r1pipe.records import Prompt, Trace
from r1pipe.rollout import Sampler, SamplingParams
from r1pipe.run import open_run
from r1pipe.sft.finetune import pack_traces
from r1pipe.sft.loop import epochs_of, train

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
    with pytest.raises(NumericProblem, match="gradient's norm is nan"):
        engine.train_step([lambda: (loss_of(engine.module, batch()) * 0).sqrt()])  # 0 x infinity


def test_the_job_ends_with_one_line_exit_code_2_and_no_checkpoint(tmp_path):
    chat = Chat.load(content_dir() / "tokenizer")
    folder = write_run(tmp_path / "run", tiny("cold_start", "stage.save_every=1", "stage.eval.every=0"))
    traces = [
        Trace(Prompt(str(i), "word", "en", f"{i}?"), f"<think>\n{i}\n</think>\n\n{i}") for i in range(9)
    ]
    with pytest.raises(SystemExit) as end, open_run(folder) as run:
        rows = pack_traces(chat, traces, 64)
        engine = Engine(broken(), run.stage.optim, run.stage.router, engine_config(), 2)
        train(run, engine, epochs_of(run, rows, 2), 2, chat.pad_id, dict)
    assert end.value.code == 2
    told = (folder / "error.txt").read_text()
    assert LAYER in told and told.count("\n") == 1
    assert not list((folder / "checkpoints").iterdir())


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.9}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sampling_names_the_layer_too(params, value):
    sampler = Sampler(broken(value=value), eos_id=2, pad_id=0)
    with pytest.raises(NumericProblem, match=LAYER) as error:
        sampler.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=4, n=2, **params))
    assert "\n" not in str(error.value)


def test_finite_steps_hook_nothing():
    model = tiny_model()
    engine = Engine(model, OPTIM, None, engine_config(), total_steps=10)
    before = sum(len(module._forward_hooks) for module in model.modules())
    engine.train_step([partial(loss_of, model, batch())])
    assert sum(len(module._forward_hooks) for module in model.modules()) == before
