"""PPO's value model: the expected return at every token (DeepSeekMath section 4.1.1).

Axes: N completion tokens of a micro-batch, T those of one completion.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from r1pipe.config import EngineConfig, PPOConfig, RLConfig
from r1pipe.core.types import Group, Score
from r1pipe.model import Balance, Policy
from r1pipe.model.scalar import ScalarModel
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.memory import elements
from r1pipe.train.rl.advantages import gae, is_scored, token_rewards
from r1pipe.train.rl.batch import (
    MicroBatch,
    Rollout,
    by_prompt,
    collate,
    micro_batches,
    rollouts_of,
    split_evenly,
)
from r1pipe.train.rl.losses import value_loss
from r1pipe.train.rl.scoring import KL
from r1pipe.train.rl.update import Reference, balances_of, completion_hidden

Metrics = dict[str, float]
MIN_DEVIATION = 1e-6  # lower bound where advantages are divided by their deviation


class ValueModel(ScalarModel):
    """The policy's trunk with a scalar head that starts at zero, so that every first estimate is 0."""

    def forward(self, micro: MicroBatch, balances: tuple[Balance, Balance] | None = None) -> Tensor:
        """-> values_N, the value before each completion token; `balances` as in completion_hidden."""
        return self.score(completion_hidden(self.model, micro, balances)).squeeze(-1).float()


class Critic:
    """The value model in an engine of its own: estimates before the policy's update, and its own update."""

    def __init__(self, model: Policy, config: RLConfig, ppo: PPOConfig, engine: EngineConfig):
        """`model`: a copy of the first policy, whose trunk is now the value model's."""
        value_model = ValueModel(model)
        self.config, self.ppo = config, ppo
        self.parameters = sum(map(elements, value_model.parameters()))
        factor, optim = ppo.value_lr_factor, config.optim
        self.engine = Engine(
            value_model,
            replace(optim, lr=factor * optim.lr, min_lr=factor * optim.min_lr),
            config.router,
            engine,
            config.max_steps * config.minibatches * config.inner_epochs,
        )

    # --- before the policy's update

    def estimate(self, groups: Sequence[Group], reference: Reference | None) -> tuple[list[Rollout], Metrics]:
        """The groups as rollouts with an advantage and a return per token, and metrics of the values.

        A KL in the reward is taken off each token. The groups' advantages become the means over the tokens.
        """
        rollouts = rollouts_of(groups)
        if reference is not None and self.config.kl_in == "reward":
            reference.estimate_kl(rollouts, self.config)
            scores = [score for group in groups for score in group.scores]
            for score, rollout in zip(scores, rollouts, strict=True):
                score[KL] = Score(rollout.kl())
        batches = by_prompt(rollouts, self.config.max_tokens_per_micro_batch)
        micros = [collate(rows, None, 0.0, self.engine.device) for rows in batches]
        found = self.engine.evaluate([partial(self.engine.module, micro) for micro in micros])
        for rows, micro, values_N in zip(batches, micros, found, strict=True):
            for row, values_T in zip(rows, values_N.cpu().split(micro.lengths_B.tolist()), strict=True):
                row.values = values_T.tolist()
        rewards = [reward for group in groups for reward in group.rewards]
        for rollout, reward in zip(rollouts, rewards, strict=True):
            values_T = torch.tensor(rollout.values)
            last = reward if is_scored(reward) else 0.0
            rewards_T = token_rewards(last, rollout.kl_T, self.config.kl_coef, len(values_T))
            advantages_T = gae(rewards_T, values_T, self.ppo.gamma, self.ppo.gae_lambda)
            rollout.advantages = advantages_T.tolist()
            rollout.returns = (advantages_T + values_T).tolist()
        metrics = self._quality(rollouts)
        if self.ppo.whiten:
            self._whiten(rollouts)
        means = iter([fmean(r.advantages) if r.scored else 0.0 for r in rollouts])
        for group in groups:
            group.advantages = [next(means) for _ in group.completions]
        return rollouts, metrics

    def _quality(self, rollouts: Sequence[Rollout]) -> Metrics:
        """`value/explained_variance` is 1 - Var(R - V) / Var(R) over the tokens of all ranks: 1 is perfect,
        0 no better than a constant."""
        scored = [rollout for rollout in rollouts if rollout.scored]
        returns_N = torch.tensor([x for rollout in scored for x in rollout.returns], dtype=torch.float64)
        values_N = torch.tensor([x for rollout in scored for x in rollout.values], dtype=torch.float64)
        errors_N = returns_N - values_N
        count, *sums = self.engine.sum_over_ranks(
            [float(len(values_N)), values_N.sum().item(), *_moments(returns_N), *_moments(errors_N)]
        )
        returns_mean, deviation = _mean_and_deviation(sums[1], sums[2], count)
        _, error = _mean_and_deviation(sums[3], sums[4], count)
        return {
            "value/mean": sums[0] / max(count, 1.0),
            "value/return_mean": returns_mean,
            "value/explained_variance": 1 - (error / deviation) ** 2 if deviation else 0.0,
            "value/parameters": float(self.parameters),
        }

    def _whiten(self, rollouts: Sequence[Rollout]) -> None:
        """Shift and scale advantages to mean 0 and deviation 1 over the scored tokens of all ranks."""
        scored = [rollout for rollout in rollouts if rollout.scored]
        advantages_N = torch.tensor([x for r in scored for x in r.advantages], dtype=torch.float64)
        sums = self.engine.sum_over_ranks([*_moments(advantages_N), float(len(advantages_N))])
        mean, deviation = _mean_and_deviation(*sums)
        scale = max(deviation, MIN_DEVIATION)
        for rollout in scored:
            rollout.advantages = [(value - mean) / scale for value in rollout.advantages]

    # --- its own update

    def learn(self, rollouts: Sequence[Rollout]) -> Metrics:
        """Fit the values to the returns, in as many optimizer steps as the policy takes."""
        config = self.config
        minibatches = [
            micro_batches(self.engine, minibatch, config, "token")
            for minibatch in split_evenly(rollouts, config.minibatches)
        ]
        steps = []
        for _ in range(config.inner_epochs):
            for micros in minibatches:
                steps.append(self.engine.train_step([partial(self._share_of_loss, m) for m in micros]))
        skipped = {"value/skipped": float(steps[-1].skipped)} if steps[-1].skipped else {}
        moved = [step for step in steps if not step.broken]
        if not moved:
            return skipped
        return skipped | {
            "value/loss": fmean(step.loss for step in moved),
            "value/grad_norm": fmean(step.grad_norm for step in moved),
            "value/lr": fmean(step.lr for step in moved),
        }

    def _share_of_loss(self, micro: MicroBatch) -> Tensor:
        assert micro.values_N is not None and micro.returns_N is not None
        alpha = self.config.router.balance_alpha
        balances = balances_of(micro, with_loss=alpha > 0)
        values_N = self.engine.module(micro, balances)
        loss_N = value_loss(values_N, micro.values_N, micro.returns_N, self.ppo.value_clip)
        loss = (micro.weights_N * loss_N).sum()
        if not alpha:
            return loss
        return loss + alpha * micro.balance_weight * (balances[0].total() + balances[1].total())


def _moments(values_N: Tensor) -> tuple[float, float]:
    return values_N.sum().item(), values_N.square().sum().item()


def _mean_and_deviation(total: float, squares: float, count: float) -> tuple[float, float]:
    """Mean and deviation of `count` numbers from their sum and their squares' sum; 0 and 0 for none."""
    mean = total / max(count, 1.0)
    return mean, max(0.0, squares / max(count, 1.0) - mean**2) ** 0.5
