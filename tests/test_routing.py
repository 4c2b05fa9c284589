"""The experts of sampler and trainer beside each other: the same, unless one of them is stale."""

import copy
from itertools import product

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model
from rl_runs import go, metrics_of
from tiny_runs import tiny_run

from r1pipe.config.compose import compose
from r1pipe.model import DeepseekV3
from r1pipe.model.cache import Decoder
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.moe import gates
from r1pipe.model.native import NativeDecoder
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl import routing
from r1pipe.train.rl.batch import Rollout
from r1pipe.train.rollout import SamplingParams, batching
from r1pipe.train.rollout.batching import Batcher

STAGE = tiny("grpo").stage
PROMPTS = [[5, 6, 7], [9], [4, 4]]
needs_kernels = pytest.mark.skipif(not runs_here(torch.float32), reason="the CPU kernels do not run here")
KINDS = [Decoder, pytest.param(NativeDecoder, marks=needs_kernels)]


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_model(), OPTIM, ROUTER, engine_config(), total_steps=10)


def drawn(model: DeepseekV3, slots: int = 4, record: bool = True) -> list[Rollout]:
    """Two ragged completions of each prompt, in fewer slots than completions."""
    params = SamplingParams(8, n=2, seed=1, stop_token_ids=tuple(range(400)), record_experts=record)
    completions = Batcher(model.eval(), (), 0, slots).generate(PROMPTS, params)
    return [Rollout(PROMPTS[i // 2], completion, 0.0, True) for i, completion in enumerate(completions)]


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_weights_all_experts_are_the_same(engine, kind, monkeypatch):
    monkeypatch.setattr(batching, "decoder_of", lambda model, graphs: kind(model))
    rollouts, counts = drawn(engine.module), []
    lengths = {len(rollout.completion.tokens) for rollout in rollouts}
    assert len(lengths) > 2, "slots must be refilled and dropped"
    monkeypatch.setattr(engine, "sum_over_ranks", lambda values: counts.extend(values) or values)
    agreement = routing.routing_agreement(engine, rollouts, STAGE, 9)
    same, chosen = counts
    config = engine.module.config
    layers = config.num_hidden_layers - config.first_k_dense_replace
    tokens = sum(len(rollout.completion.tokens) for rollout in rollouts)
    assert same == chosen == tokens * layers * config.num_experts_per_tok
    assert agreement == {"train/routing_agreement": 1.0}


@needs_kernels
def test_both_decoders_record_the_same(engine, monkeypatch):
    found = []
    for kind, slots in product((Decoder, NativeDecoder), (3, 9)):
        monkeypatch.setattr(batching, "decoder_of", lambda model, graphs, kind=kind: kind(model))
        found.append([rollout.completion.experts for rollout in drawn(engine.module, slots)])
    for other in found[1:]:
        for one, of_other in zip(found[0], other, strict=True):
            assert (
                one.shape[0] > 0
                and (torch.tensor(one).sort().values == torch.tensor(of_other).sort().values).all()
            )


def test_a_stale_router_is_seen(engine):
    stale = copy.deepcopy(engine.module)
    for gate in gates(stale):
        gate.e_score_correction_bias.copy_(torch.linspace(-5, 5, len(gate.e_score_correction_bias)))
    found = routing.routing_agreement(engine, drawn(stale), STAGE, 9)["train/routing_agreement"]
    assert found < 0.9


def test_nothing_is_said_where_nothing_is_recorded(engine):
    rollouts = drawn(engine.module, record=False)
    assert all(rollout.completion.experts is None for rollout in rollouts)
    assert routing.routing_agreement(engine, rollouts, STAGE, 9) == {}


def test_the_shortest_are_compared(engine, monkeypatch):
    taken, collate = [], routing.collate
    monkeypatch.setattr(routing, "collate", lambda rows, *more: taken.extend(rows) or collate(rows, *more))
    rollouts = drawn(engine.module)
    routing.routing_agreement(engine, rollouts, STAGE, 2)
    lengths = sorted(len(rollout.completion.tokens) for rollout in rollouts)
    assert [len(row.completion.tokens) for row in taken] == lengths[:2]


@pytest.mark.parametrize("stage", ["grpo", "zero", "all_scenario"])
def test_a_gpus_recipe_compares_all_along(stage):
    found = compose([f"stage={stage}", "recipe=gpu"]).config.stage
    assert 0 < found.routing_check_samples <= found.prompts_per_step * found.group_size / 100, "a cheap share"
    assert found.eval.every


def test_the_loop_logs_it_where_it_is_asked_for(tmp_path):
    words = ["stage=grpo", "stage.max_steps=1", "stage.sampling.max_tokens=8", "stage.kl_coef=0"]
    for count in (0, 2):
        folder = tiny_run(tmp_path / str(count), *words, f"stage.routing_check_samples={count}")
        go(folder)
        [row] = metrics_of(folder)
        assert row.get("train/routing_agreement") == (1.0 if count else None)
