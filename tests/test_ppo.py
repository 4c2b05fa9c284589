"""PPO in numbers worked by hand, its value model, and the loop with both on a tiny model."""

import math
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest
import torch
from jobs import engine_config, on_two_ranks, tiny_model
from rl_runs import go, go_killed_and_resumed, metrics_of, rollout_of
from safetensors.torch import load_file
from tiny_runs import tiny_config, tiny_run
from two_ranks_ppo import groups_of, trained

from r1pipe.config import RLConfig
from r1pipe.config.compose import compose
from r1pipe.config.fields import field_types
from r1pipe.config.groups import options, read
from r1pipe.core.errors import ConfigError
from r1pipe.core.types import Score
from r1pipe.train.rl import scoring
from r1pipe.train.rl.advantages import gae, token_rewards
from r1pipe.train.rl.batch import by_prompt, collate
from r1pipe.train.rl.critic import Critic, ValueModel
from r1pipe.train.rl.losses import value_loss
from r1pipe.train.rl.update import Reference

PPO = ("stage=grpo", "stage.algorithm=ppo", "stage.sampling.max_tokens=8")


# --- advantages and the value loss


def test_the_reward_is_the_last_tokens_and_the_kl_each_ones():
    kl_T = torch.tensor([0.5, -1.0, 2.0])
    assert token_rewards(1.0, kl_T, 0.1, 3).tolist() == pytest.approx([-0.05, 0.1, 0.8])
    assert token_rewards(1.0, None, 0.1, 2).tolist() == [0.0, 1.0]


def test_generalised_advantages_of_a_hand_worked_completion():
    rewards_T, values_T = torch.tensor([0.0, -0.5, 1.0]), torch.tensor([0.2, 0.4, 0.5])
    # with gamma 0.5: d = 0 + 0.2 - 0.2, -0.5 + 0.25 - 0.4, 1 + 0 - 0.5
    assert gae(rewards_T, values_T, 0.5, 0.0).tolist() == pytest.approx([0.0, -0.65, 0.5])
    # and with lambda 0.5 a quarter of what follows: 0.5, -0.65 + 0.125, 0 - 0.13125
    assert gae(rewards_T, values_T, 0.5, 0.5).tolist() == pytest.approx([-0.13125, -0.525, 0.5])
    # with both 1 it is what was earned from there on, less what was expected
    assert gae(rewards_T, values_T, 1.0, 1.0).tolist() == pytest.approx([0.5 - 0.2, 0.5 - 0.4, 1.0 - 0.5])


def test_the_value_loss_is_squared_and_its_clip_never_lowers_it():
    values_N = torch.tensor([0.9, 0.9, 0.1], requires_grad=True)
    old_N, returns_N = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    plain = value_loss(values_N, old_N, returns_N, None)
    assert plain.tolist() == pytest.approx([0.01 / 2, 0.81 / 2, 0.81 / 2])
    clipped = value_loss(values_N, old_N, returns_N, 0.2)
    # held at 0.7: further from 1 than 0.9 is, and nearer to 0
    assert clipped.tolist() == pytest.approx([0.09 / 2, 0.81 / 2, 0.81 / 2])
    clipped.sum().backward()
    assert values_N.grad.tolist() == pytest.approx([0.0, 0.9, -0.9])


def test_token_advantages_stand_in_the_place_of_the_groups():
    estimates = [([0.1, 0.2], [1.0, -1.0], [1.1, -0.8]), ([0.3], [0.5], [0.8])]
    rollouts = [rollout_of([1], [7] * len(values), [-0.5] * len(values), 9.0) for values, *_ in estimates]
    for rollout, estimate in zip(rollouts, estimates, strict=True):
        rollout.values, rollout.advantages, rollout.returns = estimate
    micro = collate(rollouts, [0.5, 0.5], 0.0, torch.device("cpu"))
    assert micro.advantages_N.tolist() == [1.0, -1.0, 0.5]
    assert micro.values_N.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert micro.returns_N.tolist() == pytest.approx([1.1, -0.8, 0.8])


# --- the value model

LONG = (
    *("stage.max_steps=30", "stage.optim.schedule=constant", "stage.optim.min_lr=0", "stage.inner_epochs=2"),
    "stage.router.balance_alpha=0.001",
)


def critic_of(*words: str, level: int = 0) -> Critic:
    stage = tiny_config(*PPO, "stage.minibatches=1", "stage.optim.lr=0.01", *words).stage
    return Critic(tiny_model(), stage, stage.ppo, engine_config(1, level))


def test_a_value_is_of_what_stands_before_its_token_whatever_the_micro_batch():
    policy = tiny_model()
    model = ValueModel(policy)
    torch.nn.init.normal_(model.score.weight)
    rollouts = [rollout_of(p, [7, 8, 9, 3][:n], [0.0] * n) for p in ([1, 5, 6], [4]) for n in (1, 4)]
    for rows in [*by_prompt(rollouts, 1), *by_prompt(rollouts, 100)]:
        values_N = model(collate(rows, [1.0] * len(rows), 0.0, torch.device("cpu")))
        expected = []
        for row in rows:
            hidden_TD = model.model(torch.tensor([row.prompt + row.completion.tokens[:-1]]))[0]
            expected.append(model.score(hidden_TD[len(row.prompt) - 1 :]).squeeze(-1))
        torch.testing.assert_close(values_N, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_fresh_value_model_expects_nothing_and_advantages_are_what_was_earned():
    groups = groups_of([1.0, 0.0, math.nan, 0.5])
    critic = critic_of("stage.ppo.whiten=false")
    rollouts, metrics = critic.estimate(groups, None)
    assert [r.advantages for r in rollouts] == [[1.0] * 2, [0.0] * 4, [0.0], [0.5] * 3]
    assert [group.advantages for group in groups] == [[1.0, 0.0], [0.0, 0.5]]
    assert metrics["value/mean"] == 0.0 and metrics["value/explained_variance"] == pytest.approx(0.0)
    assert metrics["value/return_mean"] == pytest.approx(3.5 / 9), "what failed counts for nothing"
    assert metrics["value/parameters"] == sum(p.numel() for p in critic.engine.module.parameters())


def test_whitened_advantages_have_mean_0_and_deviation_1_over_tokens():
    groups = groups_of([1.0, 0.0, math.nan, 0.5])
    rollouts, _ = critic_of().estimate(groups, None)
    tokens = torch.tensor([x for r in rollouts if r.scored for x in r.advantages])
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert tokens.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)


def test_the_kl_goes_off_each_token_and_is_told_as_a_score():
    groups = groups_of([1.0, 0.0, 0.0, 0.0])
    critic = critic_of("stage.ppo.whiten=false", "stage.kl_coef=0.5")
    reference = Reference(tiny_model(), engine_config())
    rollouts, _ = critic.estimate(groups, reference)
    first = rollouts[0]
    micro = collate([first], [1.0], 0.0, torch.device("cpu"))
    kl_T = micro.old_N - reference.logprobs([micro], 1.0)[0]
    earned = [(1.0 - 0.5 * kl_T.sum()).item(), (1.0 - 0.5 * kl_T[1]).item()]
    assert first.returns == pytest.approx(earned, abs=1e-5)
    assert groups[0].scores[0]["kl"].value == pytest.approx(kl_T.sum().item(), abs=1e-5)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_values_learn_what_is_earned(level):
    critic = critic_of("stage.ppo.whiten=false", *LONG, level=level)
    losses = []
    for _ in range(25):
        groups = groups_of([1.0, 0.0, math.nan, 0.5])
        rollouts, metrics = critic.estimate(groups, None)
        losses.append(critic.learn(rollouts)["value/loss"])
    # a first token cannot know which of two completions it begins: at best 0.64 is explained
    assert losses[-1] < losses[0] / 3 and metrics["value/explained_variance"] > 0.2


# --- the switch


def test_every_algorithm_has_its_file():
    assert set(options("stage/part/algorithm")) == set(get_args(field_types(RLConfig)["algorithm"]))
    assert read("stage/part/algorithm/grpo")["ppo"] is None


def test_one_word_makes_it_ppo_in_every_stage_and_recipe():
    for stage in ("grpo", "zero", "all_scenario"):
        for recipe in ("laptop", "smoke", "gpu", "cluster"):
            words = [f"stage={stage}", f"recipe={recipe}", "stage.loss=grpo"]  # the smoke recipe names DAPO
            plain = compose(words).config.stage
            found = compose([*words, "stage.algorithm=ppo"]).config.stage
            assert (plain.algorithm, plain.ppo) == ("grpo", None) and found.ppo is not None
            assert (found.kl_in, found.kl_estimator, found.normalise_std) == ("reward", "k1", False)
            assert found.optim == plain.optim and found.clip == plain.clip
    own = compose(["stage=grpo", "stage.algorithm=ppo", "stage.ppo.gae_lambda=0.95"]).config.stage
    assert own.ppo.gae_lambda == 0.95
    assert compose(["stage=grpo", "stage.algorithm=ppo", "stage.group_size=1"]).config.stage.group_size == 1
    assert compose(["stage=grpo", "stage.algorithm=ppo", "stage.kl_coef=0"]).config.stage.kl_coef == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("stage.algorithm=pppo", "stage.algorithm=pppo: no such algorithm; did you mean ppo?"),
        ("stage.ppo.gamma=0.9", "stage.ppo.gamma needs stage.algorithm=ppo"),
        ("stage.algorithm=ppo stage.ppo.lambda=1", "stage.ppo.lambda is no key of the config"),
        ("stage.algorithm=ppo stage.ppo=null", "stage.algorithm=ppo needs stage.ppo"),
        ("stage.algorithm=ppo stage.loss=dapo", "stage.loss=dapo is for groups"),
        ("stage.algorithm=ppo stage.ratio=sequence", "stage.ratio=sequence needs stage.algorithm=grpo"),
        (
            "stage.algorithm=ppo stage.normalise_std=true",
            "needs stage.algorithm=grpo; PPO has stage.ppo.whiten",
        ),
        (
            "stage.algorithm=ppo stage.max_sampling_batches=2",
            "stage.max_sampling_batches=2 needs stage.algorithm=grpo",
        ),
        ("stage.algorithm=ppo stage.ppo.gae_lambda=1.1", "stage.ppo.gae_lambda=1.1 must be from 0 to 1"),
        ("stage.algorithm=ppo stage.ppo.value_lr_factor=0", "would teach the value model nothing"),
        ("stage.algorithm=ppo stage.ppo.value_clip=0", "would hold every value"),
        ("stage.algorithm=ppo stage.ppo.value_warmup_steps=99", "leaves none of stage.max_steps"),
        ("stage.group_size=1", "give 2 or more"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_and_remedy(words, told):
    with pytest.raises(ConfigError) as caught:
        compose(["stage=grpo", *words.split()])
    assert told in str(caught.value) and "\n" not in str(caught.value)


# --- the loop


def even_share(prompts, completions, names, verdicts=None):
    """The reward is the share of even token ids, which is a half to begin with."""
    return [{"accuracy": Score(sum(t % 2 == 0 for t in c.tokens) / len(c.tokens))} for c in completions]


@pytest.mark.parametrize(("level", "warmup"), [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_killed_and_resumed_training_is_the_same_to_the_last_bit(level, warmup, tmp_path, monkeypatch):
    """So are the value model, its moments and its schedule; also where the policy has not begun to learn."""
    monkeypatch.setattr(scoring, "score_all", even_share)
    overrides = (
        *(*PPO, "stage.max_steps=3", "stage.save_every=1", "stage.keep=9", "stage.optim.lr=0.01"),
        *(
            "stage.reference_every=1",
            "stage.kl_coef=0.1",
            "stage.inner_epochs=2",
            "stage.optim.schedule=linear",
        ),
        *("stage.ppo.gae_lambda=0.9", "stage.ppo.value_clip=0.2", f"engine.zero_level={level}"),
        f"stage.ppo.value_warmup_steps={warmup}",
    )
    whole, broken = (tiny_run(tmp_path / name, *overrides) for name in ("whole", "broken"))
    go(whole)
    go_killed_and_resumed(broken, "step-3", monkeypatch)
    assert metrics_of(broken) == metrics_of(whole)
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == [1, 2, 3]
    expected, found, first = (
        load_file(folder / "checkpoints" / step / "model.safetensors")
        for folder, step in ((whole, "step-3"), (broken, "step-3"), (whole, "step-1"))
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(first["lm_head.weight"], expected["lm_head.weight"]), "training must train"
    values = [weights_of_critic(folder, 3) for folder in (whole, broken)]
    assert all(torch.equal(values[1][name], tensor) for name, tensor in values[0].items())
    before = weights_of_critic(whole, 2)
    assert not torch.equal(before["model.score.weight"], values[0]["model.score.weight"])
    assert rows[0]["value/mean"] == 0.0 and rows[1]["value/mean"] != 0.0
    assert rows[0]["rewards/kl/mean"] == pytest.approx(0.0, abs=1e-3)
    kl = [row["rewards/kl/mean"] / row["completions/mean_length"] for row in rows]
    assert [row["kl"] for row in rows] == pytest.approx(kl), "of the policy and of the value model's engine"
    assert rows[warmup]["sampling/sampling_logp_difference/mean"] < 1e-4
    rollouts = pq.read_table(whole / "rollouts" / "step-3.parquet").to_pylist()
    assert len(rollouts) == 16 and any(row["advantage"] for row in rollouts)


def weights_of_critic(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state = folder / "checkpoints" / f"step-{step}" / "engine" / "critic" / "state"
    return torch.load(state / "mp_rank_00_model_states.pt", weights_only=False)["module"]


def test_a_tiny_policy_learns_a_trivial_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_all", even_share)
    folder = tiny_run(
        tmp_path / "run",
        *(*PPO, "stage.max_steps=12", "stage.save_every=0", "stage.prompts_per_step=8", "stage.group_size=8"),
        *("stage.sampling.max_num_seqs=64", "stage.optim.lr=0.02", "stage.loss_aggregation=token"),
        *("stage.rewards.truncation_penalty=0.0",),
    )
    go(folder)
    rows = metrics_of(folder)
    curve = [row["reward"] for row in rows]
    assert curve[0] < 0.65 and curve[-1] > 0.9
    assert rows[-1]["value/mean"] > 0.5


def test_the_policy_waits_for_the_values_and_one_completion_a_prompt_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_all", even_share)
    words = (
        "stage.max_steps=2",
        "stage.ppo.value_warmup_steps=1",
        "stage.group_size=1",
        "stage.save_every=1",
    )
    folder = tiny_run(tmp_path / "run", *PPO, *words, "stage.keep=9")
    go(folder)
    first, second = metrics_of(folder)
    assert "train/loss" not in first and first["value/loss"] > 0 and "train/loss" in second


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    return on_two_ranks("two_ranks_ppo.py", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_two_engines_on_two_ranks_train_as_on_one(level, two_ranks):
    found, alone = two_ranks[str(level)], trained(0, 1)[2]
    for metrics, expected in zip(found["metrics"], alone, strict=True):
        for name in ("value/mean", "value/explained_variance", "value/grad_norm", "train/grad_norm"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name
    for sizes in found["sizes"]:
        assert sizes[0] == sizes[1], "both ranks have the same weights"


def test_it_runs_on_the_real_rewards(tmp_path):
    """Its KL is a reward by weight, but no rule that could be asked."""
    folder = tiny_run(tmp_path / "run", *PPO, "stage.max_steps=1", "stage.kl_coef=0.1")
    go(folder)
    [row] = metrics_of(folder)
    assert {"rewards/kl/mean", "rewards/accuracy/mean"} <= row.keys()
