"""The variants of the loss in numbers worked by hand, and the loop with each of their options."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from threading import Barrier
from types import SimpleNamespace
from typing import get_args

import pyarrow.parquet as pq
import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from rl_runs import go, go_killed_and_resumed, metrics_of, objective, rollout_of, scored_groups
from safetensors.torch import load_file
from tiny_runs import tiny_config, tiny_run

from r1pipe.config import RLConfig
from r1pipe.config.compose import COMMAND_LINE, compose
from r1pipe.config.fields import field_types
from r1pipe.config.groups import options, read
from r1pipe.core.errors import ConfigError
from r1pipe.core.types import Completion, Group, Prompt, Score
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl import losses, scoring
from r1pipe.train.rl.ahead import Batch, LoopState
from r1pipe.train.rl.batch import rollouts_of
from r1pipe.train.rl.loop import RLTrainer
from r1pipe.train.rl.scoring import has_signal, redistribute_groups
from r1pipe.train.rl.update import Reference, update

# --- the loss


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def loss_of(ratios, advantages, lengths, chosen, trainer=None):
    """The loss, and its gradient by each log-probability, of tokens with these ratios and weight 1."""
    old_N = torch.full((len(ratios),), 0.1).log()
    behind_N = old_N if trainer is None else old_N + logs(*trainer)
    logprobs_N = (behind_N + logs(*ratios)).requires_grad_()
    result = losses.policy_loss(
        logprobs_N,
        old_N,
        torch.tensor(advantages),
        torch.ones(len(ratios)),
        torch.tensor(lengths),
        chosen,
        trainer_N=None if trainer is None else behind_N,
    )
    result.loss.backward()
    return result, logprobs_N.grad.tolist()


def test_the_upper_bound_is_its_own():
    ratios, advantages = [1.25, 1.3, 0.75, 0.85], [1.0, 1.0, -1.0, -1.0]
    result, slopes = loss_of(ratios, advantages, [4], objective(clip_high=0.28))
    assert result.loss.item() == pytest.approx(-(1.25 + 1.28 - 0.8 - 0.85))
    assert slopes == pytest.approx([-1.25, 0.0, 0.0, 0.85])
    assert (result.sums["clipped"], result.sums["clipped_low"]) == (2, 1)


def test_the_clip_of_r1_lets_all_but_the_wildest_ratios_through():
    result, slopes = loss_of([10.9, 11.1, 0.001], [1.0, 1.0, -1.0], [3], objective(clip=10, clip_high=10))
    assert result.loss.item() == pytest.approx(-(10.9 + 11.0 - 0.001), rel=1e-6)
    assert slopes == pytest.approx([-10.9, 0.0, 0.001], rel=1e-5)


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    # sequences of two and of one token: ratios (4 x 1)^(1/2) = 2 and 0.9
    result, slopes = loss_of([4.0, 1.0, 0.9], [1.0, 1.0, 1.0], [2, 1], objective(ratio="sequence"))
    assert result.loss.item() == pytest.approx(-(1.2 + 1.2 + 0.9))  # the first is held at 1.2, as a whole
    assert slopes == pytest.approx([0.0, 0.0, -0.9])
    assert result.sums["clipped"] == 2
    _, slopes = loss_of([4.0, 1.0, 0.9], [-1.0, -1.0, 1.0], [2, 1], objective(ratio="sequence"))
    # two tokens' terms of 2, each moved by half of each token's log-probability
    assert slopes == pytest.approx([2.0, 2.0, -0.9])


def test_a_clipped_weight_drops_no_gradient():
    chosen = objective(surrogate="cispo", clip=1.0, clip_high=4.0)
    result, slopes = loss_of([0.01, 2.0, 6.0], [1.0, -1.0, 1.0], [3], chosen)
    logprobs = [math.log(0.1 * ratio) for ratio in (0.01, 2.0, 6.0)]
    weights = [0.01, -2.0, 5.0]
    assert result.loss.item() == pytest.approx(-sum(w * x for w, x in zip(weights, logprobs, strict=True)))
    assert slopes == pytest.approx([-weight for weight in weights])
    assert (result.sums["clipped"], result.sums["clipped_low"]) == (1, 0)


def test_truncated_importance_makes_up_for_another_sampler():
    # pi_trainer / pi_sampler of 3 and 0.5, at most 2; the ratio is to the trainer
    chosen = objective(importance="token_truncate", importance_cap=2.0)
    result, slopes = loss_of([1.1, 1.3], [1.0, -1.0], [2], chosen, trainer=[3.0, 0.5])
    assert result.loss.item() == pytest.approx(-(2 * 1.1 - 0.5 * 1.3), rel=1e-5)
    assert slopes == pytest.approx([-2.2, 0.65], rel=1e-5)
    assert result.sums["beyond"] == 1 and result.extremes["importance_ratio/max"].item() == pytest.approx(1.3)
    assert result.sums["gap"].item() == pytest.approx(math.log(3.3) - math.log(0.65), rel=1e-5)


def test_the_three_estimators_of_the_kl():
    found = {
        name: estimate(logs(0.5, 0.2), logs(0.25, 0.4)).tolist()
        for name, estimate in losses.KL_ESTIMATORS.items()
    }
    log2 = math.log(2)
    assert found["k1"] == pytest.approx([log2, -log2])
    assert found["k2"] == pytest.approx([log2**2 / 2] * 2)
    assert found["k3"] == pytest.approx([0.5 + log2 - 1, 2 - log2 - 1], abs=1e-6)


def test_where_an_estimator_pulls_when_it_is_in_the_loss():
    """Expected gradients over a policy of three tokens: k1's is none, k2's is that of KL(pi || pi_ref)."""
    logits_V = torch.tensor([1.0, 0.2, -0.5], requires_grad=True)
    logprobs_V, reference_V = logits_V.log_softmax(0), logs(0.3, 0.3, 0.4)
    probabilities_V = logprobs_V.exp().detach()

    def slope(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits_V, retain_graph=True)[0]

    drawn = {
        name: slope((probabilities_V * estimate(logprobs_V, reference_V)).sum())
        for name, estimate in losses.KL_ESTIMATORS.items()
    }
    kl = (logprobs_V.exp() * (logprobs_V - reference_V)).sum()
    torch.testing.assert_close(drawn["k1"], torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn["k2"], slope(kl))


# --- what shapes the reward


PROMPT = Prompt("p", "word", "en", "?", "4")


def group(*accuracies: float) -> Group:
    scores = [{"accuracy": Score(value), "overlong": Score(-i / 10)} for i, value in enumerate(accuracies)]
    return Group(PROMPT, [Completion([7], [-1.0], "stop")] * len(scores), scores, [0.0], [0.0])


def test_a_group_teaches_by_its_verdicts_and_not_by_its_lengths():
    weights = {"accuracy": 1.0, "overlong": 1.0}
    assert has_signal(group(1.0, 0.0), weights)
    assert not has_signal(group(1.0, 1.0), weights) and not has_signal(group(0.0, 0.0), weights)


class Together:
    """Ranks in threads, as far as they gather objects."""

    def __init__(self, world_size: int):
        self.world_size, self.barrier, self.given = world_size, Barrier(world_size), [None] * world_size

    def rank(self, rank: int) -> SimpleNamespace:
        def all_gather_objects(value: object) -> list:
            self.given[rank] = value
            self.barrier.wait()
            found = [*self.given]
            self.barrier.wait()
            return found

        return SimpleNamespace(rank=rank, world_size=self.world_size, all_gather_objects=all_gather_objects)


def test_the_first_groups_of_all_ranks_that_teach_are_trained_on_in_equal_shares():
    right, mixed = (1.0, 1.0), (1.0, 0.0)

    def learned(wanted: int, *shares: list[tuple[float, float]]) -> list[list[tuple[int, bool]]]:
        """By rank: the place of each group in the order of drawing, and whether it is trained on."""
        together = Together(2)

        def one(rank: int) -> list[tuple[int, bool]]:
            groups = [group(*accuracies) for accuracies in shares[rank]]
            for number, each in enumerate(groups):
                each.place = rank + 2 * number
            groups = redistribute_groups(together.rank(rank), groups, {"accuracy": 1.0}, wanted)
            return [(each.place, each.trained) for each in groups]

        with ThreadPoolExecutor(2) as threads:
            return [*threads.map(one, range(2))]

    # all that teach are the first rank's: the second one gets its half of them
    assert learned(2, [mixed, mixed], [right, right]) == [[(0, True)], [(2, True), (1, False), (3, False)]]
    # too few: the first of the others too
    assert learned(2, [right, right], [right, mixed]) == [[(3, True), (2, False)], [(0, True), (1, False)]]


def test_what_is_passed_over_makes_no_rollouts():
    done = [Completion([7], [-1.0], "stop")]
    groups = [Group(PROMPT, done, [{}], [1.0], [0.5], prompt_tokens=tokens) for tokens in ([1], [2])]
    groups[0].trained = False
    (rollout,) = rollouts_of(groups)
    assert rollout.prompt == [2]


def test_the_kl_in_the_reward_is_taken_off_before_the_groups_mean(monkeypatch):
    stage = tiny_config("stage=grpo", "stage.kl_in=reward", "stage.kl_coef=0.5").stage
    weights = scoring.reward_weights(stage)
    assert (weights["kl"], weights["overlong"]) == (-0.5, 0.0)
    asked = []

    def score_all(prompts, completions, names, verdicts=None):
        asked.extend(names)
        return [{"accuracy": Score(1.0)}, {"accuracy": Score(0.0)}]

    monkeypatch.setattr(scoring, "score_all", score_all)
    completions = [Completion([7], [-1.0], "stop")] * 2
    (found,) = scored_groups([PROMPT], completions, weights, normalise_std=False, kls=[0.4, 0.0])
    assert found.rewards == pytest.approx([1 - 0.5 * 0.4, 0.0])
    assert found.advantages == pytest.approx([0.4, -0.4])
    assert not {"kl", "overlong"} & set(asked), "no verifier knows them"


def test_each_completion_gets_the_sum_over_its_own_tokens():
    stage = replace(tiny_config("stage=grpo", "stage.kl_estimator=k1").stage, max_tokens_per_micro_batch=12)
    reference = Reference(tiny_model(), engine_config())
    prompts = [[1, 5, 6], [1, 5, 6], [4, 8], [4, 8]]
    tokens = [[7, 8], [9, 3, 5, 2], [7], [6, 6, 2]]
    rollouts = [rollout_of(prompts[i], row, [-0.5 - i] * len(row)) for i, row in enumerate(tokens)]
    reference.estimate_kl(rollouts, stage)
    for i, (prompt, row, rollout) in enumerate(zip(prompts, tokens, rollouts, strict=True)):
        logits = reference.frozen.module(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1).gather(1, torch.tensor(row).unsqueeze(1))
        assert rollout.kl() == pytest.approx((-0.5 - i) * len(row) - logprobs.sum().item(), rel=1e-4), i


# --- the update


def updated(sampler_error: float, *words: str) -> dict[str, float]:
    """The metrics of one update on tokens that the sampler gave an error in their log-probabilities."""
    stage = tiny_config("stage=grpo", "stage.minibatches=1", *words).stage
    policy = tiny_model()
    reference = Reference(deepcopy(policy), engine_config())
    engine = Engine(policy, OPTIM, ROUTER, engine_config(), total_steps=10)
    rollouts = []
    for n in (1, 2, 3, 4):
        prompt, tokens = [1, 5, 6], list(range(7, 7 + n))
        logits = policy(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].detach()
        true_N = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        rollouts.append(rollout_of(prompt, tokens, (true_N + sampler_error).tolist(), (-1.0) ** n))
    return update(engine, rollouts, stage, reference)


def test_the_trainers_own_log_probabilities_are_from_before_the_first_update():
    plain, wrong = updated(0.0, "stage.loss_aggregation=token"), updated(-0.7, "stage.loss_aggregation=token")
    assert plain["importance_ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert wrong["importance_ratio/max"] == pytest.approx(math.exp(0.7), rel=1e-4)
    capped = updated(-0.7, "stage.loss_aggregation=token", "stage.importance_cap=1.5")
    assert capped["importance_ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert capped["sampling/sampling_logp_difference/mean"] == pytest.approx(0.7, abs=1e-4)
    assert capped["sampling/importance_sampling_ratio/capped"] == 1.0
    # every token weighs 1.5; the reference is the policy of now, so no KL adds to it
    assert capped["train/grad_norm"] == pytest.approx(1.5 * plain["train/grad_norm"], rel=1e-3)
    again = updated(0.0, "stage.loss_aggregation=token", "stage.importance_cap=1.5", "stage.inner_epochs=2")
    assert again["importance_ratio/max"] > 1.01, (
        "the second epoch's ratio is to the policy of before the first"
    )


@pytest.mark.parametrize("level", [2, 3])
def test_the_trainers_log_probabilities_come_at_every_zero_level(level):
    stage = tiny_config("stage=grpo", "stage.minibatches=1", "stage.importance_cap=2").stage
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(1, level), total_steps=10)
    rollouts = [rollout_of([1, 5, 6], [7, 8, 9][:n], [-7.0] * n, (-1.0) ** n) for n in (1, 2, 3, 2)]
    metrics = [update(engine, rollouts, stage, None) for _ in range(2)]
    assert metrics[0]["importance_ratio/max"] == pytest.approx(1.0, abs=1e-4)


# --- names of losses


def test_every_loss_has_its_file_and_says_all_that_another_would_change():
    names = options("stage/part/loss")
    assert set(names) == set(get_args(field_types(RLConfig)["loss"]))
    plain = read("stage/part/loss/grpo")
    for name in names:
        content = read(f"stage/part/loss/{name}")
        assert content["loss"] == name and plain.keys() <= content.keys()


def test_a_loss_goes_over_what_is_below_its_name_and_under_what_stands_beside_it():
    found = compose(["stage=grpo", "stage.loss=dapo", "stage.clip=0.1"])
    stage = found.config.stage
    assert isinstance(stage, RLConfig)
    assert (stage.loss, stage.clip, stage.clip_high, stage.kl_coef) == ("dapo", 0.1, 0.28, 0.0)
    assert stage.max_sampling_batches > 1 and stage.rewards.weights["overlong"] == 1.0
    sources = [found.sources[f"stage.{key}"] for key in ("loss", "clip", "clip_high", "reference_every")]
    assert sources == [
        COMMAND_LINE,
        COMMAND_LINE,
        "conf/stage/part/loss/dapo.yaml",
        "conf/recipe/laptop.yaml",
    ]
    before = compose(["stage.clip=0.1", "stage.loss=dapo", "stage=grpo"]).config
    assert before == found.config, "wherever it stands"


def test_a_recipes_own_values_go_over_the_loss_that_it_names(monkeypatch):
    from r1pipe.config import compose as module

    read = module.read

    def with_loss(name):
        content = read(name)
        if name.startswith("recipe/"):
            own = content["stage_values"]["grpo"] | {"loss": "gspo", "clip": 0.01}
            return content | {"stage_values": content["stage_values"] | {"grpo": own}}
        return content

    monkeypatch.setattr(module, "read", with_loss)
    stage = compose(["stage=grpo"]).config.stage
    assert (stage.ratio, stage.clip, stage.clip_high) == ("sequence", 0.01, 4e-4)
    other = compose(["stage=grpo", "stage.loss=grpo"]).config.stage
    assert (other.ratio, other.clip, other.clip_high) == ("token", 0.01, None)


def test_without_a_name_the_recipes_are_what_they_were():
    for recipe, expected in (("laptop", (0.2, "token")), ("cluster", (10.0, "sequence"))):
        stage = compose([f"recipe={recipe}", "stage=grpo"]).config.stage
        assert (stage.clip, stage.loss_aggregation) == expected
        assert (stage.loss, stage.ratio, stage.surrogate, stage.clip_high) == (
            "grpo",
            "token",
            "clipped",
            None,
        )
        assert (stage.normalise_std, stage.kl_estimator, stage.kl_in) == (True, "k3", "loss")
        assert stage.max_sampling_batches == 1
        assert stage.rewards.weights["overlong"] == 0.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("stage.loss=dappo", "stage.loss=dappo: no such loss; did you mean dapo?"),
        ("stage=cold_start stage.loss=dapo", "stage.loss is no key of the config"),
        ("stage.ratio=word", "is none of token, sequence"),
        ("stage.surrogate=min", "is none of clipped, cispo"),
        ("stage.kl_estimator=k4", "is none of k1, k2, k3"),
        ("stage.kl_in=both", "is none of loss, reward"),
        ("stage.loss=dapo stage.kl_in=reward", "stage.kl_in=reward needs stage.kl_coef above 0"),
        ("stage.kl_coef=0 stage.kl_estimator=k2", "stage.kl_estimator=k2 needs stage.kl_coef above 0"),
        ("stage.importance_cap=0.5", "give 1 or more, or stage.importance=none"),
        ("stage.max_sampling_batches=0", "must be 1 or more"),
        ("stage.rewards.overlong_cache=1.5", "must be from 0 to 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_and_remedy(words, told):
    with pytest.raises(ConfigError) as caught:
        compose(words.split())
    assert told in str(caught.value) and "\n" not in str(caught.value)


# --- the loop


def right_where_the_first_token_is_even(prompts, completions, names, verdicts=None):
    """So that some groups of four are right, or wrong, as a whole."""
    return [{"accuracy": Score(float(c.tokens[0] % 2 == 0))} for c in completions]


SHORT = (
    "stage=grpo",
    "stage.max_steps=2",
    "stage.save_every=1",
    "stage.keep=9",
    "stage.sampling.max_tokens=8",
)


@pytest.mark.parametrize(
    "words",
    [
        ("stage.loss=dapo",),
        ("stage.loss=dr_grpo", "stage.importance=geometric_mask"),
        ("stage.loss=gspo", "stage.kl_in=reward", "stage.kl_estimator=k1", "stage.reference_every=1"),
        ("stage.loss=cispo", "stage.max_sampling_batches=3"),
    ],
)
def test_each_loss_trains_and_goes_on_after_a_kill_to_the_last_bit(words, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_all", right_where_the_first_token_is_even)
    whole, broken = (tiny_run(tmp_path / name, *SHORT, *words) for name in ("whole", "broken"))
    go(whole)
    go_killed_and_resumed(broken, "step-2", monkeypatch)
    assert metrics_of(broken) == metrics_of(whole) and len(metrics_of(whole)) == 2
    expected, found, first = (
        load_file(folder / "checkpoints" / step / "model.safetensors")
        for folder, step in ((whole, "step-2"), (broken, "step-2"), (whole, "step-1"))
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(first["lm_head.weight"], expected["lm_head.weight"]), "training must train"
    row = metrics_of(whole)[0]
    if "stage.kl_in=reward" in words:
        # the reference is the policy itself in the first step; in the second it no longer is at the end
        assert row["rewards/kl/mean"] == pytest.approx(0.0, abs=1e-3)
        rows = metrics_of(whole)
        assert [row["kl"] for row in rows] == pytest.approx(
            [row["rewards/kl/mean"] / row["completions/mean_length"] for row in rows]
        )
    if "stage.loss=dapo" in words:
        assert row["rewards/overlong/mean"] <= 0


def test_a_step_draws_until_enough_groups_teach(tmp_path, monkeypatch):
    def seldom_right(prompts, completions, names, verdicts=None):
        return [{"accuracy": Score(float(c.tokens[0] % 8 == 0))} for c in completions]

    monkeypatch.setattr(scoring, "score_all", seldom_right)
    words = ("stage.max_sampling_batches=20", "stage.group_size=2", "stage.rewards.truncation_penalty=0")
    folder = tiny_run(tmp_path / "run", *SHORT, *words)
    go(folder)
    for step, row in enumerate(metrics_of(folder), 1):
        rows = pq.read_table(folder / "rollouts" / f"step-{step}.parquet").to_pylist()
        batches = row["rollout/batches"]
        assert len(rows) == batches * 4 * 2  # all that was drawn is kept and counted
        trained = [r for r in rows if r["trained"]]
        assert len(trained) == 4 * 2 and all(r["advantage"] != 0 for r in trained)
        assert row["frac_reward_zero_std"] == pytest.approx(
            sum(r["advantage"] == 0 for r in rows) / len(rows)
        )
        # the batch before the last had too few of them
        before = [r for r in rows[: int(batches - 1) * 8] if r["advantage"] != 0]
        assert len(before) < 4 * 2
    assert max(row["rollout/batches"] for row in metrics_of(folder)) > 1
    prompts = [r["prompt_id"] for r in rows]
    assert len(set(prompts)) == len(prompts) / 2, "every batch has prompts of its own"


def test_a_limit_ends_the_drawing_and_the_step_is_filled_up(tmp_path, monkeypatch):
    def always_right(prompts, completions, names, verdicts=None):
        return [{"accuracy": Score(1.0)} for _ in completions]

    monkeypatch.setattr(scoring, "score_all", always_right)
    folder = tiny_run(
        tmp_path / "run", *SHORT, "stage.max_sampling_batches=3", "stage.rewards.truncation_penalty=0"
    )
    go(folder)
    assert [row["rollout/batches"] for row in metrics_of(folder)] == [3, 3]
    rows = pq.read_table(folder / "rollouts" / "step-2.parquet").to_pylist()
    assert [row["trained"] for row in rows] == [True] * 16 + [False] * 32


def test_ranks_draw_until_they_have_enough_together():
    """Four prompts a step on two ranks; one of this one's two groups of a batch teaches."""
    stage = replace(tiny_config("stage=grpo").stage, prompts_per_step=4, max_sampling_batches=9)
    others, seen = iter([0.0, 1.0, 1.0]), []  # how many of the other rank's teach so far
    loop = object.__new__(RLTrainer)
    loop.config, loop.weights, loop.state = stage, {"accuracy": 1.0}, LoopState()

    def sum_over_ranks(values: list[float]) -> list[float]:
        seen.append(values[0])
        return [values[0] + next(others)]

    loop.engine = SimpleNamespace(
        world_size=2,
        rank=0,
        agree_max=int,
        sum_over_ranks=sum_over_ranks,
        all_gather_objects=lambda mine: [mine, []],
    )
    loop.run = SimpleNamespace(phase=lambda name, metrics: nullcontext())

    def take(state: LoopState, number: int) -> Batch:
        drawn = [group(*accuracies) for accuracies in ((1.0, 0.0), (0.0, 0.0))]
        completions = [one for each in drawn for one in each.completions]
        batch = Batch(0, number, 0, (0, 0), 0, [PROMPT] * 2, [[number]] * 2, completions=completions)
        batch.groups = lambda: [replace(one, prompt_tokens=[number]) for one in drawn]
        return batch

    loop.rollouts = SimpleNamespace(take=take)
    loop.score = lambda groups, verdicts: None
    metrics: dict[str, float] = {}
    groups = loop.sample_groups(metrics)
    assert seen == [1, 2, 3] and metrics["rollout/batches"] == 3, "1 + 0, 2 + 1, 3 + 1 of 4"
    # 0, 4 and 8 teach, 2 is the first of the others; every second one is the other rank's to learn from
    assert [(one.place, one.trained) for one in groups] == [(0, True), (8, True), (6, False), (10, False)]
    assert [one.prompt_tokens for one in groups] == [[0], [2], [1], [2]], "by their batches"
