"""The experts of sampler and trainer beside each other: the same, unless one of them is stale."""

import copy

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model
from rl_runs import go, metrics_of, rollout_of
from tiny_runs import tiny_run

from r1pipe.config.compose import compose
from r1pipe.model.cache import Decoder, LatentCache
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.moe import gates
from r1pipe.model.native import NativeDecoder
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl import update as routing

STAGE = tiny("grpo").stage
ROLLOUTS = [
    rollout_of(prompt, completion, [0.0] * len(completion))
    for prompt, completion in [
        ([5, 6, 7], [8, 9, 10, 11, 12]),
        ([5, 6, 7], [13, 14]),
        ([9], [20, 21, 22]),
        ([4, 4], [30]),  # of one token, which is read by nobody
    ]
]


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_model(), OPTIM, ROUTER, engine_config(), total_steps=10)


@pytest.mark.parametrize("kind", [Decoder, NativeDecoder])
def test_with_the_same_weights_all_experts_are_the_same(engine, kind, monkeypatch):
    if kind is NativeDecoder and not runs_here(torch.float32):
        pytest.skip("this processor has no AVX-512, or there is no compiler")
    monkeypatch.setattr(routing, "decoder_of", kind)
    counts = []
    monkeypatch.setattr(engine, "sum_over_ranks", lambda values: counts.extend(values) or values)
    agreement = routing.routing_agreement(engine, ROLLOUTS, STAGE, 9)
    same, chosen = counts
    config = engine.module.config
    layers = config.num_hidden_layers - config.first_k_dense_replace
    assert same == chosen == (4 + 1 + 2) * layers * config.num_experts_per_tok
    assert agreement == {"train/routing_agreement": 1.0}


def test_a_stale_router_is_seen(engine, monkeypatch):
    stale = copy.deepcopy(engine.module)
    for gate in gates(stale):
        gate.e_score_correction_bias.copy_(torch.linspace(-5, 5, len(gate.e_score_correction_bias)))
    monkeypatch.setattr(routing, "decoder_of", lambda policy: Decoder(stale))
    found = routing.routing_agreement(engine, ROLLOUTS, STAGE, 9)["train/routing_agreement"]
    assert found < 0.9


def test_nothing_is_said_where_nothing_is_routed(engine):
    assert routing.routing_agreement(engine, ROLLOUTS[3:], STAGE, 9) == {}


def test_both_decoders_record_the_same_experts_and_only_while_asked():
    if not runs_here(torch.float32):
        pytest.skip("this processor has no AVX-512, or there is no compiler")
    model, seen = tiny_model().eval(), []
    tokens, lengths = torch.tensor([[5, 6], [7, 8]]), torch.tensor([2, 2])
    for kind in (Decoder, NativeDecoder):
        decoder, cache, rows = kind(model), LatentCache(model, 2, 8), torch.arange(2)
        entries, _ = decoder.prefill(tokens, lengths)
        cache.fill(rows, entries, rows)
        with decoder.recorded() as experts:
            decoder.decode(torch.tensor([3, 4]), lengths, cache, 3)
        decoder.decode(torch.tensor([3, 4]), lengths + 1, cache, 4)
        seen.append(torch.stack(experts).sort().values)
    assert torch.equal(*seen)


def test_the_shortest_are_compared_as_all_ranks_wait_for_the_longest(engine, monkeypatch):
    taken, collate = [], routing.collate
    monkeypatch.setattr(routing, "collate", lambda rows, *more: taken.extend(rows) or collate(rows, *more))
    routing.routing_agreement(engine, ROLLOUTS, STAGE, 2)
    assert [len(row.completion.tokens) for row in taken] == [2, 3], "one token alone is read by nobody"


@pytest.mark.parametrize("recipe", ["gpu", "cluster"])
@pytest.mark.parametrize("stage", ["grpo", "zero", "all_scenario"])
def test_the_larger_recipes_compare_all_along(recipe, stage):
    found = compose([f"stage={stage}", f"recipe={recipe}"]).config.stage
    assert 0 < found.routing_check_samples <= found.prompts_per_step * found.group_size / 100, "a cheap share"
    assert found.eval.every


def test_the_loop_logs_it_where_it_is_asked_for(tmp_path):
    words = ["stage=grpo", "stage.max_steps=1", "stage.sampling.max_tokens=8", "stage.kl_coef=0"]
    for count in (0, 2):
        folder = tiny_run(tmp_path / str(count), *words, f"stage.routing_check_samples={count}")
        go(folder)
        [row] = metrics_of(folder)
        assert row.get("train/routing_agreement") == (1.0 if count else None)
