"""GRPO in exact numbers: losses, advantages, micro-batches, and the loop on a tiny model."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from rl_runs import go, go_killed_and_resumed, metrics_of, objective, rollout_of, scored_groups
from safetensors.torch import load_file
from tiny_runs import tiny_config, tiny_run

from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.types import Completion, Group, Message, Prompt, Score, Status
from r1pipe.model import DeepseekV3, logprobs
from r1pipe.model.kernels import training as kernels
from r1pipe.runs.files import Tail
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl import losses, scoring
from r1pipe.train.rl.advantages import group_advantages, has_variance, most_varied
from r1pipe.train.rl.batch import (
    Rollout,
    by_prompt,
    collate,
    rollouts_of,
    scored_counts,
    split_evenly,
    weights_of,
)
from r1pipe.train.rl.prompts import PromptStream, general_count
from r1pipe.train.rl.rows import REFLECTIVE, rows_of, summarise, too_many_failures, write_rows
from r1pipe.train.rl.stage import run_rl_stage
from r1pipe.train.rl.update import balances_of, completion_logprobs, update

NAN = math.nan


def rollout(prompt: list[int], tokens: list[int], advantage: float = 1.0) -> Rollout:
    return rollout_of(prompt, tokens, [-0.5] * len(tokens), advantage)


# --- losses


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_kl_is_the_unbiased_estimator_and_never_negative():
    kl_N = losses.kl_k3(logs(0.5, 0.5, 0.2), logs(0.25, 0.5, 0.4))
    expected = [0.5 - math.log(0.5) - 1, 0.0, 2 - math.log(2) - 1]
    assert kl_N.tolist() == pytest.approx(expected, abs=1e-6)
    assert (losses.kl_k3(torch.randn(1000), torch.randn(1000)) >= 0).all()


def test_kl_estimates_the_divergence_on_average():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = (policy * (policy / reference).log()).sum()
    estimate = (policy * losses.kl_k3(policy.log(), reference.log())).sum()
    assert estimate.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 2.0, 2.4, 0.0),  # good and already far more likely: held at 1.2
        (1.5, -2.0, -3.0, -2.0),  # bad and more likely: full gradient
        (0.5, -2.0, -1.6, 0.0),  # bad and already far less likely: held at 0.8
        (0.5, 2.0, 1.0, 2.0),  # good and less likely: full gradient
        (1.1, 2.0, 2.2, 2.0),
    ],
)
def test_clip_takes_the_gradient_only_where_it_should(ratio, advantage, value, slope):
    ratio_N = torch.tensor([ratio], requires_grad=True)
    surrogate = losses.clipped_surrogate(ratio_N, torch.tensor([advantage]), 0.2, 0.2)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(value)
    assert ratio_N.grad.item() == pytest.approx(slope)


def test_policy_loss_and_its_gradient_by_hand():
    logprobs_N = logs(0.5, 0.2, 0.3).requires_grad_()
    result = losses.policy_loss(
        logprobs_N,
        old_N=logs(0.5, 0.1, 0.3),
        advantages_N=torch.tensor([1.0, 1.0, -2.0]),
        weights_N=torch.tensor([0.25, 0.5, 0.0]),  # the last token's reward failed
        lengths_B=torch.tensor([2, 1]),
        config=objective(kl_coef=0.1),
        reference_N=logs(0.25, 0.2, 0.9),
    )
    result.loss.backward()
    kl = 0.5 + math.log(2) - 1
    assert result.loss.item() == pytest.approx(0.25 * (0.1 * kl - 1) + 0.5 * (0 - 1.2))
    # d/dlogprob: -A ratio inside the clip, 0 outside; KL gives 1 - pi_ref/pi
    assert logprobs_N.grad.tolist() == pytest.approx([0.25 * (0.1 * 0.5 - 1), 0.0, 0.0], abs=1e-7)
    assert [result.sums[name] for name in ("tokens", "clipped", "clipped_low")] == [2, 1, 0]
    assert result.sums["kl"].item() == pytest.approx(kl)
    assert result.extremes["importance_ratio/max"].item() == pytest.approx(2.0)
    assert result.sums["gap"].item() == pytest.approx(math.log(2))


def test_logprobs_in_chunks_equal_the_whole(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda *given, **few: False)
    torch.manual_seed(0)
    head = logprobs.Head(6, 11)
    hidden_ND = torch.randn(7, 6, requires_grad=True)
    targets_N = torch.randint(11, (7,))

    def run(temperature):
        result_N = head(hidden_ND, targets_N, temperature)
        return result_N, torch.autograd.grad(result_N.exp().sum(), [hidden_ND, head.weight])

    expected = torch.log_softmax(head(hidden_ND) / 0.7, -1).gather(1, targets_N[:, None])[:, 0]
    whole, whole_grads = run(0.7)
    monkeypatch.setattr(logprobs, "LOGITS_IN_MEMORY", 22)  # two tokens at a time
    chunked, chunked_grads = run(0.7)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(chunked_grads, whole_grads)
    assert not torch.allclose(run(1.0)[0], chunked), "the temperature must matter"


# --- advantages


def test_advantages_of_a_hand_worked_group():
    assert group_advantages([1.0, 0.0, 0.0, 1.0], True) == [1.0, -1.0, -1.0, 1.0]
    assert group_advantages([3.0, 0.0, 0.0], True) == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)])
    assert group_advantages([3.0, 0.0, 0.0], False) == [2.0, -1.0, -1.0]


def test_a_failed_score_counts_for_nothing_in_its_group():
    assert group_advantages([1.0, NAN, 0.0], True) == [1.0, 0.0, -1.0]
    assert group_advantages([NAN, NAN], True) == [0.0, 0.0]
    assert not has_variance([NAN, 1.0, NAN])


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_the_kept_completions_have_the_largest_variance_of_all_choices(count):
    random = np.random.default_rng(count)
    for rewards in random.choice([-1.0, 0.0, 0.1, 1.0], (20, 6)).tolist():
        kept = most_varied(rewards, count)
        largest = max(np.var(chosen) for chosen in combinations(rewards, count))
        assert len({*kept}) == count
        assert np.var([rewards[place] for place in kept]) == pytest.approx(largest)


def test_a_failed_score_is_kept_last():
    assert most_varied([NAN, 0.0, NAN, 1.0], 2) == [1, 3]
    assert most_varied([NAN, 0.0, NAN, 1.0], 3) == [0, 1, 3]


def test_a_part_of_each_group_is_trained_on(monkeypatch):
    scores_of(monkeypatch, *({"accuracy": Score(reward)} for reward in (0.0, 0.0, 1.0)))
    completions = [Completion([token], [-1.0], "stop") for token in (7, 8, 9)]
    [group] = scored_groups([PROMPT], completions, {"accuracy": 1.0}, trained_per_group=2)
    assert group.rewards == [0.0, 0.0, 1.0] and group.kept == [1, 2]
    assert group.advantages == [0.0, -1.0, 1.0]
    assert [(r.completion.tokens, r.advantage) for r in rollouts_of([group])] == [([8], -1.0), ([9], 1.0)]
    assert [row["trained"] for row in rows_of([group], None)] == [False, True, True]


def test_a_group_without_variance_teaches_nothing():
    same = [0.1 + 0.2, 0.3, 0.3]  # rounding is not variance
    assert not has_variance(same)
    assert group_advantages(same, True) == [0.0, 0.0, 0.0]


# --- micro-batches


def test_groups_become_rollouts_and_failed_ones_weigh_nothing():
    completions = [Completion([7, 2], [-0.1, -0.2], "stop"), Completion([8], [-0.3], "length")]
    group = Group(
        Prompt("p", "word", "en", "?"), completions, [{}, {}], [1.0, NAN], [0.5, 0.0], prompt_tokens=[1, 5]
    )
    first, second = rollouts_of([group])
    assert (first.prompt, first.completion, first.advantage) == ([1, 5], completions[0], 0.5)
    assert scored_counts([first, second]) == (1.0, 2.0)
    assert weights_of([first, second], "token", 1.0, 2.0, 9) == [0.5, 0.0]


def test_the_means_weigh_lengths_differently():
    rollouts = [rollout([1], [5, 6, 2]), rollout([1], [2])]
    sequences, tokens = scored_counts(rollouts)
    assert weights_of(rollouts, "sequence", sequences, tokens, 8) == [pytest.approx(1 / 6), 0.5]
    assert weights_of(rollouts, "token", sequences, tokens, 8) == [0.25, 0.25]
    assert weights_of(rollouts, "constant", sequences, tokens, 8) == [1 / 16, 1 / 16]


def test_micro_batches_are_of_whole_groups_and_never_pad_beyond_the_limit():
    a, b, c, d = [1, 1], [2], [3, 3, 3], [4]
    rollouts = [
        rollout(prompt, [9] * n)
        for prompt, lengths in ((a, (3, 4)), (b, (50,)), (c, (2, 5)), (d, (8, 9, 7)))
        for n in lengths
    ]
    batches = by_prompt(rollouts, max_tokens=26)
    found = [[(r.prompt[0], len(r.completion.tokens)) for r in batch] for batch in batches]
    # the longest first; group 4 is cut, as it does not fit alone; 3 and 1 pad to 2 x 3 + 4 x 5 tokens
    assert found == [[(2, 50)], [(4, 9), (4, 8)], [(4, 7)], [(3, 5), (3, 2), (1, 4), (1, 3)]]


def test_minibatches_are_disjoint_and_complete():
    rollouts = [rollout([1], [i]) for i in range(8)]
    halves = split_evenly(rollouts, 2)
    assert [len(half) for half in halves] == [4, 4]
    assert [*halves[0], *halves[1]] == rollouts


def test_collate_points_at_completion_tokens_only_and_learns_eos():
    eos = 2
    micro = collate(
        [rollout([1, 5], [7, 8, eos], advantage=1.0), rollout([1], [9, eos], advantage=-1.0)],
        weights=[0.1, 0.2],
        balance_weight=0.5,
        device=torch.device("cpu"),
    )
    # the second prompt has one token, which its row begins with
    assert micro.prompts_PT.tolist() == [[1], [0]] and micro.prompt_lengths_P.tolist() == [1, 0]
    assert micro.prompt_of_B.tolist() == [0, 1]
    assert micro.tokens_BT.tolist() == [[5, 7, 8], [1, 9, 0]]  # a row begins with its prompt's last token
    assert micro.sources_N.tolist() == [0, 1, 2, 3, 4]
    assert micro.targets_N.tolist() == [7, 8, eos, 9, eos]
    assert micro.advantages_N.tolist() == [1, 1, 1, -1, -1]
    assert micro.weights_N.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.2])
    assert micro.lengths_B.tolist() == [3, 2] and micro.balance_weight == 0.5
    assert micro.reference_N is None


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_neither_shared_prompts_nor_micro_batches_nor_filling_change_the_gradient(ratio):
    chosen = objective(ratio=ratio)
    model = DeepseekV3(tiny_config("stage=grpo").model, torch.Generator().manual_seed(1))
    prompts = [[1, 5, 6, 11, 3], [4, 8], [2]]  # of several lengths; the last leaves nothing to share
    rollouts = [
        rollout(prompts[n % 3], list(range(7, 7 + n)), advantage=(-1.0) ** n)
        for n in (1, 4, 9, 2, 6, 7, 3, 5)
    ]
    counts = scored_counts(rollouts)

    def gradient(
        loss_of: Callable[[list[Rollout]], torch.Tensor], max_tokens_per_micro_batch: int
    ) -> torch.Tensor:
        model.zero_grad()
        for rows in by_prompt(rollouts, max_tokens_per_micro_batch):
            loss_of(rows).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    def shared(rows: list[Rollout]) -> torch.Tensor:
        micro = collate(rows, weights_of(rows, "token", *counts, 9), 0.0, torch.device("cpu"))
        logprobs_N = completion_logprobs(model, micro, 1.0)
        tensors = (micro.old_N, micro.advantages_N, micro.weights_N, micro.lengths_B)
        return losses.policy_loss(logprobs_N, *tensors, chosen).loss

    def whole(rows: list[Rollout]) -> torch.Tensor:
        """Every rollout by itself, prompt and completion in one plain forward pass."""
        loss = torch.zeros(())
        for row, weight in zip(rows, weights_of(rows, "token", *counts, 9), strict=True):
            logits = model(torch.tensor([row.prompt + row.completion.tokens]))[0, len(row.prompt) - 1 : -1]
            targets = torch.tensor(row.completion.tokens)
            logprobs_N = logits.float().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
            each = torch.ones(len(targets))
            tensors = (torch.tensor(row.completion.logprobs), each * row.advantage, each * weight)
            loss = loss + losses.policy_loss(logprobs_N, *tensors, torch.tensor([len(each)]), chosen).loss
        return loss

    plain = gradient(whole, 1)
    assert len(by_prompt(rollouts, 1)) == 8 and len(by_prompt(rollouts, 1000)) == 1
    torch.testing.assert_close(gradient(shared, 1), plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(shared, 1000), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_prompts_are_shared_under_zero_3_too(recompute):
    """Its hooks around every module hand on copies of lists, and let go of weights after each pass; gradients
    enter a layer by its states, its cache entries and its balance loss."""
    rollouts = [rollout(prompt, [7, 8, 9][:n]) for prompt in ([1, 5, 6], [4, 2]) for n in (1, 2, 3)]
    micro = collate(rollouts, [0.1] * len(rollouts), 0.0, torch.device("cpu"))

    def stats_at(level: int, again: bool) -> tuple[float, float]:
        config = replace(engine_config(1, level), recompute=again)
        engine = Engine(tiny_model(), OPTIM, ROUTER, config, total_steps=10)

        def loss() -> torch.Tensor:
            balances = balances_of(micro, with_loss=True)
            logprobs_N = completion_logprobs(engine.module, micro, 1.0, balances)
            return (balances[0].total() + balances[1].total()) - logprobs_N.mean()

        stats = engine.train_step([loss])
        return stats.loss, stats.grad_norm

    assert stats_at(3, recompute) == pytest.approx(stats_at(0, False), rel=1e-4)


def steps_of_update(alpha: float, max_tokens_per_micro_batch: int, monkeypatch, repeats: int = 0):
    """Two optimizer steps on nine completions of three prompts: their stats, and the update's metrics."""
    prompts = [[1, 5, 6, 11], [4, 8], [2]]
    rollouts = [rollout(prompt, [7, 8, 9, 3][:n], 1.0 - n) for prompt in prompts for n in (1, 2, 4)]
    router = replace(ROUTER, balance_alpha=alpha)
    engine = Engine(tiny_model(), OPTIM, router, engine_config(), total_steps=10)
    monkeypatch.setattr(engine, "agree_max", lambda value: value + repeats)  # as if another rank had more
    stats, train_step = [], engine.train_step
    monkeypatch.setattr(engine, "train_step", lambda losses: stats.append(train_step(losses)) or stats[-1])
    stage = tiny_config("stage=grpo", "stage.minibatches=1", "stage.inner_epochs=2").stage
    config = replace(stage, max_tokens_per_micro_batch=max_tokens_per_micro_batch, router=router)
    return stats, update(engine, rollouts, config, None)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_loads_count_each_prompt_once_and_no_filling(alpha, monkeypatch):
    stats, _ = steps_of_update(alpha, 1000, monkeypatch)
    # prompts but for their last tokens, which the rows begin with; two experts a token
    assert [step.loads_LE.sum(1).tolist() for step in stats] == [[2 * (3 + 1 + 0 + 3 * 7)]] * 2


def test_what_is_repeated_for_a_rank_with_more_micro_batches_counts_nowhere(monkeypatch):
    (plain, metrics), (other, same) = (steps_of_update(0.1, 12, monkeypatch, repeats) for repeats in (0, 2))
    assert same == metrics and metrics["train/balance_loss"] > 0
    for expected, step in zip(plain, other, strict=True):
        assert torch.equal(step.loads_LE, expected.loads_LE)
        assert (step.loss, step.grad_norm) == (expected.loss, expected.grad_norm)


# --- rewards of a step

PROMPT = Prompt("p", "word", "en", "?", "4")
GENERAL = Prompt("g", "writing", "en", "?")


def completion(text: str = "", reason: str = "stop") -> Completion:
    return Completion([7, 2], [-1.0, -3.0], reason, text)


def scores_of(monkeypatch, *rows: dict[str, Score]) -> None:
    monkeypatch.setattr(scoring, "score_all", lambda *given: [dict(row) for row in rows])


def test_a_failed_verifier_is_not_a_wrong_answer():
    failed = {"accuracy": Score(0.0, Status.VERIFIER_FAILED), "format": Score(1.0)}
    assert math.isnan(scoring.total_reward(failed, {"accuracy": 1.0, "format": 0.1}, 0.0, False))
    assert scoring.total_reward(failed, {"accuracy": 0.0, "format": 0.1}, 0.0, False) == 0.1


def test_rewards_are_summed_with_weights_and_being_cut_off_costs():
    scores = {"accuracy": Score(1.0), "format": Score(0.5)}
    weights = {"accuracy": 1.0, "format": 0.2, "language": 3.0}
    assert scoring.total_reward(scores, weights, -0.5, truncated=False) == pytest.approx(1.1)
    assert scoring.total_reward(scores, weights, -0.5, truncated=True) == pytest.approx(0.6)


def test_reward_models_score_general_prompts_alone(monkeypatch):
    scores_of(monkeypatch, {"accuracy": Score(1.0)}, {"accuracy": Score(0.0)}, {}, {})
    seen = []

    def helpful(prompts, completions):
        seen.extend(prompts)
        return [Score(0.25), Score(0.75)]

    groups = scored_groups(
        [PROMPT, GENERAL],
        [completion()] * 4,
        {"accuracy": 1.0, "helpful": 2.0},
        {"helpful": helpful},
    )
    assert [group.rewards for group in groups] == [[1.0, 0.0], [0.5, 1.5]]
    assert [group.advantages for group in groups] == [[1.0, -1.0], [-1.0, 1.0]]
    assert seen == [GENERAL, GENERAL]


def test_the_metrics_of_a_step_count_truncation_failures_and_zero_variance(monkeypatch):
    scores_of(
        monkeypatch,
        {"accuracy": Score(1.0), "format": Score(1.0)},
        {"accuracy": Score(0.0), "format": Score(1.0)},
        {"accuracy": Score(1.0), "format": Score(0.0)},
        {"accuracy": Score(0.0, Status.INFRASTRUCTURE_FAILED, "no sandbox"), "format": Score(0.0)},
    )
    completions = [completion(), completion(reason="length"), completion(), completion()]
    groups = scored_groups([PROMPT, PROMPT], completions, {"accuracy": 1.0})
    rows = rows_of(groups, lambda prompt, text: "careful")
    metrics = summarise(rows)
    assert metrics["completions/clipped_ratio"] == 0.25
    assert metrics["completions/reflections"] == 0.0
    assert metrics["frac_reward_failed"] == 0.25
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["reward"] == pytest.approx(2 / 3)
    assert metrics["rewards/accuracy/mean"] == pytest.approx(2 / 3)
    assert metrics["rewards/format/mean"] == 0.5
    assert metrics["entropy"] == 2.0
    assert metrics["strategy/careful"] == 1.0
    assert rows[3]["reward"] is None and rows[3]["advantage"] == 0.0


def test_a_rollout_keeps_the_messages_before_its_question(monkeypatch, tmp_path):
    scores_of(monkeypatch, {"accuracy": Score(1.0)}, {"accuracy": Score(0.0)})
    prompt = replace(PROMPT, context=(Message("system", "用中文。"),))
    groups = scored_groups([PROMPT, prompt], [completion()] * 2, {"accuracy": 1.0})
    write_rows(rows_of(groups, None), tmp_path / "step-1.parquet")
    contexts = pq.read_table(tmp_path / "step-1.parquet")["context"].to_pylist()
    assert contexts == [None, '[{"role": "system", "content": "用中文。"}]']


def test_reflection_is_counted_by_whole_words():
    assert len(REFLECTIVE.findall("Wait, let me check: that is wrong.")) == 3
    assert not REFLECTIVE.findall("awaiting a button, unchecked")


def test_nothing_is_learned_from_a_step_without_any_score(monkeypatch):
    scores_of(monkeypatch, *[{"accuracy": Score(0.0, Status.VERIFIER_FAILED, "no answer in 5 s")}] * 2)
    groups = scored_groups([PROMPT], [completion()] * 2, {"accuracy": 1.0})
    rows = rows_of(groups, None)
    metrics = summarise(rows)
    assert metrics["frac_reward_failed"] == 1.0 and "reward" not in metrics
    assert "accuracy: verifier_failed (no answer in 5 s)" in too_many_failures(metrics, 1.0, rows)


# --- prompts


def stream(length: int, fits=lambda prompt: True) -> PromptStream:
    def draw(pool: int) -> list[Prompt]:
        return [Prompt(f"{100 + pool}/{i}", "word", "en", "?") for i in range(length)]

    return PromptStream(draw, fits, "problems")


def test_a_stream_goes_through_the_data_again_with_another_seed_and_can_be_taken_up_anywhere():
    taken, cursor = stream(3).take(0, 5)
    assert [prompt.id for prompt in taken] == ["100/0", "100/1", "100/2", "101/0", "101/1"]
    assert stream(3).take(cursor, 1)[0][0].id == "101/2"


def test_a_stream_passes_over_prompts_that_do_not_fit_and_ends_where_none_does():
    taken, cursor = stream(4, lambda prompt: not prompt.id.endswith("1")).take(0, 3)
    assert [prompt.id for prompt in taken] == ["100/0", "100/2", "100/3"] and cursor == 4
    with pytest.raises(DataError, match="none of 1,001 problems leaves room for"):
        stream(4, lambda prompt: False).take(0, 1)
    taken, _ = stream(4, lambda prompt: prompt.id == "105/2").take(0, 1)
    assert taken[0].id == "105/2", "one pool without any is not the whole data"
    with pytest.raises(DataError, match="no problems"):
        stream(0)


def test_preference_prompts_come_in_the_last_steps_only():
    config = tiny_config(
        "stage=all_scenario",
        "stage.max_steps=10",
        "stage.preference.last_steps=3",
        "stage.prompts_per_step=8",
    ).stage
    assert [general_count(config, step) for step in range(10)] == [0] * 7 + [4] * 3
    assert general_count(replace(config, preference=None), 9) == 0


# --- the loop, on a tiny random model


def test_killed_and_resumed_training_is_the_same_to_the_last_bit(tmp_path, monkeypatch):
    overrides = (
        *("stage=grpo", "stage.max_steps=3", "stage.save_every=1", "stage.keep=9", "stage.optim.lr=0.01"),
        *(
            "stage.sampling.max_tokens=8",
            "stage.reference_every=1",
            "stage.kl_coef=0.1",
            "stage.inner_epochs=2",
        ),
        "stage.eval.every=1",
    )
    whole, broken = (tiny_run(tmp_path / name, *overrides) for name in ("whole", "broken"))
    go(whole)
    go_killed_and_resumed(broken, "step-3", monkeypatch)

    assert metrics_of(broken) == metrics_of(whole)
    assert [row["step"] for row in metrics_of(whole)] == [1, 2, 3]
    short = [Tail(folder / "dev_evaluations.jsonl").read() for folder in (whole, broken)]
    assert short[0] == short[1] and [line["step"] for line in short[0]] == [0, 1, 2, 3]
    assert all(line["metrics"]["eval/length_mean"] and len(line["samples"]) == 1 for line in short[0])
    expected = load_file(whole / "checkpoints" / "step-3" / "model.safetensors")
    found = load_file(broken / "checkpoints" / "step-3" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    first = load_file(whole / "checkpoints" / "step-1" / "model.safetensors")
    assert not torch.equal(first["lm_head.weight"], expected["lm_head.weight"]), "training must train"
    assert metrics_of(whole)[0]["sampling/sampling_logp_difference/mean"] < 1e-4
    rollouts = pq.read_table(whole / "rollouts" / "step-3.parquet").to_pylist()
    assert len(rollouts) == 16 and {"completion", "advantage", "score_format"} <= rollouts[0].keys()


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_a_tiny_policy_learns_a_trivial_reward(loss, tmp_path, monkeypatch):
    """The reward is the share of even token ids, which is a half to begin with."""

    def even_share(prompts, completions, names, verdicts=None):
        evens = [sum(token % 2 == 0 for token in c.tokens) / len(c.tokens) for c in completions]
        return [{"accuracy": Score(value), "format": Score(0.0), "language": Score(0.0)} for value in evens]

    monkeypatch.setattr(scoring, "score_all", even_share)
    folder = tiny_run(
        tmp_path / "run",
        *("stage=grpo", "stage.max_steps=12", "stage.save_every=0", "stage.prompts_per_step=8"),
        *(
            "stage.group_size=8",
            "stage.sampling.max_tokens=8",
            "stage.sampling.max_num_seqs=64",
            "stage.optim.lr=0.02",
        ),
        *(f"stage.loss={loss}", "stage.loss_aggregation=token", "stage.rewards.truncation_penalty=0.0"),
    )
    go(folder)
    curve = [row["rewards/accuracy/mean"] for row in metrics_of(folder)]
    # the clips of DAPO and GSPO, narrower than R1's, make them slower
    assert curve[0] < 0.65 and curve[-1] > 0.8


def test_machines_of_a_hostfile_by_which_the_prompts_do_not_divide_are_refused_before_anything_is_loaded():
    run = SimpleNamespace(stage=tiny_config("stage=grpo", "stage.prompts_per_step=4").stage, world_size=3)
    with pytest.raises(ConfigError, match="prompts_per_step=4 must be a multiple of the 3 ranks"):
        run_rl_stage(run)
