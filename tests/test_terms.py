"""The loss terms beside the next token's, and recomputation, through the engine: every ZeRO level alike."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from jobs import OPTIM, engine_config, tiny, tiny_model, write_run
from rl_runs import rollout_of

from r1pipe.config import RouterConfig
from r1pipe.core.types import Example
from r1pipe.data.packing import Packed
from r1pipe.model import Balance, DeepseekV3, load_pretrained
from r1pipe.train.engine.engine import Engine
from r1pipe.train.loading import load_model
from r1pipe.train.rl.batch import split_evenly
from r1pipe.train.rl.losses import policy_loss
from r1pipe.train.rl.update import Reference, balances_of, completion_logprobs, prepare, update
from r1pipe.train.run import open_run
from r1pipe.train.sft.loop import LMLoss, train

MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.01


def rows(count: int) -> list[Packed]:
    made = []
    for n in range(count):
        row = Packed()
        for length in (9 + n, 6):
            row.add(Example([(7 * n + 3 * i) % 90 + 5 for i in range(length)], [True] * length))
        made.append(row)
    return made


def with_mtp() -> DeepseekV3:
    return DeepseekV3(replace(tiny_model().config, num_nextn_predict_layers=1))


def steps(level: int, recompute: bool, accumulation: int = 1) -> list[list[float]]:
    config = replace(engine_config(1, level), recompute=recompute)
    engine = Engine(with_mtp(), OPTIM, RouterConfig(0.01, BALANCE_WEIGHT), config, total_steps=10)
    found = []
    for _ in range(3):
        shares = LMLoss(engine, rows(4), MTP_WEIGHT, BALANCE_WEIGHT, 0)
        passes = shares.micro_losses(accumulation)
        stats = engine.train_step(passes)
        # 66 tokens of 8 documents, of which the MTP layer reads all but each last one; two experts a token
        assert stats.loads_LE.sum(1).tolist() == [2 * 66, 2 * 58]
        found.append([stats.loss, stats.grad_norm, *shares.terms(stats.loss, passes).values()])
    return found


@pytest.mark.parametrize(
    ("level", "recompute", "accumulation"),
    [(0, True, 1), (0, False, 3), (2, True, 2), (3, False, 1), (3, True, 2)],
)
def test_terms_and_recomputation_train_alike_everywhere(level, recompute, accumulation):
    plain, other = steps(0, False), steps(level, recompute, accumulation)
    for expected, found in zip(plain, other, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    loss, _, next_token, mtp, balance = plain[0]
    assert loss == pytest.approx(next_token + 0.3 * mtp + 0.01 * balance, rel=1e-6)
    learned = sum(
        row.learned for row in rows(4)
    )  # per token that the next-token loss learns, as in the paper
    further = learned - 2 * 4  # the second token of each document has no position two before it
    assert mtp == pytest.approx(math.log(1152) * further / learned, abs=0.4)
    assert balance > 2  # 1 a token and layer at the least


def test_a_stage_logs_the_terms_the_loads_and_saves_the_mtp_layer(tmp_path):
    config = tiny("cold_start", "model.num_nextn_predict_layers=1", "stage.router.balance_alpha=0.001")
    folder = write_run(tmp_path / "run", config)
    with open_run(folder) as run:
        engine = Engine(load_model(run, None), run.stage.optim, run.stage.router, engine_config(), 3)
        run.chat = SimpleNamespace(pad_id=0)
        checkpoint = train(run, engine, lambda step, position: iter([(rows(4), None)] * 3), 3)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["train/mtp_loss"] < logged[0]["train/mtp_loss"] and logged[0]["train/balance_loss"] > 0
    layers = [key for key in logged[0] if key.startswith("router/max_vio/")]
    loads = [value for key, value in logged[0].items() if key.startswith("router/load/1/")]
    assert len(layers) == 2 and sum(loads) == pytest.approx(len(loads), abs=1e-3)
    assert max(loads) - 1 == pytest.approx(logged[0]["router/max_vio/1"], abs=1e-3)
    assert load_pretrained(checkpoint).config.num_nextn_predict_layers == 1


ROLLOUTS = [
    rollout_of(prompt, list(range(7, 7 + n)), [-7.0] * n, (-1.0) ** n)
    for n, prompt in ((1, [1, 5, 6, 11]), (4, [1, 5, 6, 11]), (2, [4, 8]), (3, [4, 8]))
]


def reinforced(alpha: float, recompute: bool, max_tokens_per_micro_batch: int):
    stage = tiny("grpo").stage
    stage = replace(
        stage,
        minibatches=1,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        router=RouterConfig(0.01, alpha),
    )
    policy = with_mtp()
    policy.freeze_mtp()
    reference = Reference(deepcopy(policy), engine_config())
    engine = Engine(
        policy, OPTIM, stage.router, replace(engine_config(), recompute=recompute), total_steps=10
    )
    before = policy.model.layers[-1].eh_proj.weight.clone()
    metrics = update(engine, ROLLOUTS, stage, reference)
    assert torch.equal(policy.model.layers[-1].eh_proj.weight, before)
    reference.replace_by(engine)
    assert torch.equal(reference.frozen.module.lm_head.weight, policy.lm_head.weight)
    return metrics, engine


def test_reinforcement_takes_the_balance_loss_and_recomputation():
    plain, _ = reinforced(0.0, False, 2048)
    assert "train/balance_loss" not in plain and plain["router/max_vio"] >= 0  # no NaN of the idle MTP layer
    weighed, _ = reinforced(0.1, False, 2048)
    again, _ = reinforced(0.1, True, 2048)
    assert weighed["train/loss"] == pytest.approx(
        plain["train/loss"] + 0.1 * weighed["train/balance_loss"], rel=1e-5
    )
    for key in ("train/loss", "train/grad_norm", "train/balance_loss", "router/max_vio"):
        assert again[key] == pytest.approx(weighed[key], rel=1e-5), key
    cut, _ = reinforced(0.1, False, 12)  # a micro-batch for each prompt
    assert cut["train/balance_loss"] == pytest.approx(weighed["train/balance_loss"], rel=1e-5)


def test_filling_is_no_part_of_the_balance_loss_in_reinforcement():
    stage = replace(tiny("grpo").stage, max_tokens_per_micro_batch=2048)
    _, engine = reinforced(0.0, False, 2048)
    (micro,) = prepare(engine, ROLLOUTS, stage, None)
    assert micro.balance_weight == pytest.approx(1 / (3 + 1 + 1 + 4 + 2 + 3))
    _, of_rows = whole = balances_of(micro, with_loss=True)
    completion_logprobs(engine.module, micro, 1.0, whole)
    of_prompts, _ = balances_of(micro, with_loss=False)
    balance = Balance(torch.tensor([[1] * 4]), with_loss=True)  # the row of four, which comes first, alone
    engine.module.model.after_prompts(
        micro.prompts_PT,
        micro.prompt_lengths_P,
        micro.tokens_BT[:1],
        micro.prompt_of_B[:1],
        (of_prompts, balance),
    )
    assert 0 < balance.total() < of_rows.total() and of_prompts.total() == 0


def test_an_update_corrects_by_the_weights_that_were_sampled_from(monkeypatch):
    """The first minibatch is measured by its own step, the others before it."""
    stage = tiny("grpo").stage
    stage = replace(stage, minibatches=2, inner_epochs=2, importance="token_truncate", importance_cap=2.0)
    expected, used = [], []
    engine = Engine(tiny_model(), OPTIM, stage.router, engine_config(), total_steps=10)
    for minibatch in split_evenly(ROLLOUTS, 2):
        (micro,) = prepare(engine, minibatch, stage, None)
        expected.append(completion_logprobs(engine.module, micro, 1.0).detach())

    def seen(*arguments: object) -> object:
        used.append(arguments[7])
        return policy_loss(*arguments)

    monkeypatch.setattr("r1pipe.train.rl.update.policy_loss", seen)
    update(engine, ROLLOUTS, stage, None)
    assert len(used) == 4
    for found_N, expected_N in zip(used, expected * 2, strict=True):
        torch.testing.assert_close(found_N, expected_N, rtol=0, atol=1e-5)
