"""PPO's value model: what is still to be earned, read at every token (DeepSeekMath section 4.1.1).

Axes: N completion tokens of a micro-batch, T those of one completion.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from r1pipe.config import EngineConfig, PPOConfig, RLConfig
from r1pipe.core.types import Completion, Group, Score
from r1pipe.model import Balance, DeepseekV3
from r1pipe.model.transformer import ScalarModel
from r1pipe.runs import heartbeat
from r1pipe.train.engine.engine import Engine, StepStats
from r1pipe.train.rl.advantages import is_scored
from r1pipe.train.rl.batch import (
    Estimate,
    MicroBatch,
    Rollout,
    by_prompt,
    collate,
    rollouts_of,
    scored_counts,
    split_evenly,
    tokens_read,
    weights_of,
)
from r1pipe.train.rl.ppo import gae, mean_and_deviation, token_rewards, value_loss
from r1pipe.train.rl.shaping import kl_of_tokens
from r1pipe.train.rl.update import Reference, balances_of

Metrics = dict[str, float]
LEAST_DEVIATION = 1e-6  # of advantages that are divided by it


class ValueModel(ScalarModel):
    """The policy's trunk with a scalar head, which starts at zero: nothing is expected anywhere."""

    def forward(self, micro: MicroBatch, balances: tuple[Balance, Balance] | None = None) -> Tensor:
        """-> values_N of what stands before each completion token; `balances` as in completion_logprobs."""
        hidden_BTD = self.model.after_prompts(
            micro.prompts_PT,
            micro.prompt_lengths_P,
            micro.tokens_BT,
            micro.prompt_of_B,
            balances or balances_of(micro, with_loss=False),
        )
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, micro.sources_N)
        return self.score(hidden_ND).squeeze(-1).float()


class Critic:
    """The value model in an engine of its own: estimates before the policy's update, and its own update."""

    def __init__(self, policy: DeepseekV3, config: RLConfig, ppo: PPOConfig, engine: EngineConfig):
        """To be made before the policy's engine, which may partition the weights that it starts from."""
        model = ValueModel(deepcopy(policy))
        self.config, self.ppo = config, ppo
        self.parameters = sum(weight.numel() for weight in model.parameters())
        factor, optim = ppo.value_lr_factor, config.optim
        self.engine = Engine(
            model,
            replace(optim, lr=factor * optim.lr, min_lr=factor * optim.min_lr),
            config.router,
            engine,
            config.max_steps * config.minibatches * config.inner_epochs,
        )

    # --- before the policy's update

    def estimate(
        self, groups: Sequence[Group], prompts: Sequence[list[int]], reference: Reference | None
    ) -> tuple[list[Rollout], Metrics]:
        """The groups as rollouts with an advantage and a return for each token, and how good the values were.

        What the reward of a token loses to the KL is shown as a score, `kl`, of the whole completion. The
        groups' own advantages become the means over each completion's tokens.
        """
        completions = [completion for group in groups for completion in group.completions]
        kls = self._kl_of_tokens(groups, prompts, completions, reference)
        rollouts = rollouts_of(groups, prompts)
        values = self._values(rollouts)
        rewards = [reward for group in groups for reward in group.rewards]
        for rollout, values_T, kl_T, reward in zip(rollouts, values, kls, rewards, strict=True):
            score = reward if is_scored(reward) else 0.0  # weighs nothing, but must be a number
            rewards_T = token_rewards(score, kl_T, self.config.kl_coef, len(values_T))
            advantages_T = gae(rewards_T, values_T, self.ppo.gamma, self.ppo.gae_lambda)
            returns_T = advantages_T + values_T
            rollout.estimate = Estimate(values_T.tolist(), advantages_T.tolist(), returns_T.tolist())
        metrics = self._quality(rollouts)
        if self.ppo.whiten:
            self._whiten(rollouts)
        _show_means(groups, rollouts)
        return rollouts, metrics

    def _kl_of_tokens(
        self,
        groups: Sequence[Group],
        prompts: Sequence[list[int]],
        completions: Sequence[Completion],
        reference: Reference | None,
    ) -> Sequence[Tensor | None]:
        if reference is None or self.config.kl_in != "reward":
            return [None] * len(completions)
        kls = kl_of_tokens(reference, prompts, completions, self.config, self.engine.device)
        scores = [score for group in groups for score in group.scores]
        for score, kl_T in zip(scores, kls, strict=True):
            score["kl"] = Score(kl_T.sum().item())
        return [kl_T.cpu() for kl_T in kls]

    def _values(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """values_T of each rollout, from the weights of now."""
        found: dict[int, Tensor] = {}
        with self.engine.gathered() as model, torch.no_grad():
            for rows in by_prompt(rollouts, self.config.max_tokens_per_micro_batch):
                micro = collate(rows, [0.0] * len(rows), 0.0, self.engine.device)
                values_N = model(micro).cpu()
                heartbeat.tick()
                for row, values_T in zip(
                    rows, values_N.split([len(r.completion) for r in rows]), strict=True
                ):
                    found[id(row)] = values_T
        return [found[id(rollout)] for rollout in rollouts]

    def _quality(self, rollouts: Sequence[Rollout]) -> Metrics:
        """`value/explained_variance` is 1 - Var(R - V) / Var(R) over the tokens of all ranks: 1 is foreseen,
        0 no better than a constant."""
        estimates = [r.estimate for r in rollouts if r.scored and r.estimate]
        returns_N = torch.tensor([x for e in estimates for x in e.returns], dtype=torch.float64)
        values_N = torch.tensor([x for e in estimates for x in e.values], dtype=torch.float64)
        missed_N = returns_N - values_N
        count, *sums = self.engine.sum_over_ranks(
            [float(len(values_N)), values_N.sum().item()]
            + [
                x
                for tensor in (returns_N, missed_N)
                for x in (tensor.sum().item(), tensor.square().sum().item())
            ]
        )
        returns_mean, deviation = mean_and_deviation(sums[1], sums[2], count)
        _, missed = mean_and_deviation(sums[3], sums[4], count)
        explained = 1 - (missed / deviation) ** 2 if deviation else 0.0
        return {
            "value/mean": sums[0] / max(count, 1.0),
            "value/return_mean": returns_mean,
            "value/explained_variance": explained,
            "value/parameters": float(self.parameters),
        }

    def _whiten(self, rollouts: Sequence[Rollout]) -> None:
        """Advantages of mean 0 and deviation 1 over the judged tokens of all ranks."""
        estimates = [r.estimate for r in rollouts if r.scored and r.estimate]
        advantages_N = torch.tensor([x for e in estimates for x in e.advantages], dtype=torch.float64)
        total, squares, count = self.engine.sum_over_ranks(
            [advantages_N.sum().item(), advantages_N.square().sum().item(), float(len(advantages_N))]
        )
        mean, deviation = mean_and_deviation(total, squares, count)
        for estimate in estimates:
            estimate.advantages = [
                (value - mean) / max(deviation, LEAST_DEVIATION) for value in estimate.advantages
            ]

    # --- its own update

    def learn(self, rollouts: Sequence[Rollout]) -> Metrics:
        """Fit the values to the returns, in as many optimizer steps as the policy takes."""
        config = self.config
        minibatches = [self._micros(part) for part in split_evenly(rollouts, config.minibatches)]
        stats = [self._step(micros) for _ in range(config.inner_epochs) for micros in minibatches]
        skipped = {"value/skipped": float(stats[-1].skipped)} if stats[-1].skipped else {}
        moved = [step for step in stats if not step.broken]
        if not moved:
            return skipped
        return skipped | {
            "value/loss": fmean(step.loss for step in moved),
            "value/grad_norm": fmean(step.grad_norm for step in moved),
            "value/lr": fmean(step.lr for step in moved),
        }

    def _micros(self, minibatch: Sequence[Rollout]) -> list[MicroBatch]:
        """This rank's micro-batches, with weights that make the mean over all ranks' tokens."""
        counts = [*scored_counts(minibatch), tokens_read(minibatch)]
        sequences, tokens, read = self.engine.sum_over_ranks(counts)
        ranks, longest = self.engine.world_size, self.config.sampling.max_tokens
        return [
            collate(
                rows,
                weights_of(rows, "token", sequences / ranks, tokens / ranks, longest),
                ranks / read,
                self.engine.device,
            )
            for rows in by_prompt(minibatch, self.config.max_tokens_per_micro_batch)
        ]

    def _step(self, micros: Sequence[MicroBatch]) -> StepStats:
        closures: list[Callable[[], Tensor]] = [partial(self._share, micro) for micro in micros]
        return self.engine.train_step(closures)

    def _share(self, micro: MicroBatch) -> Tensor:
        """A micro-batch's share of the value loss, and of the experts' balance loss."""
        assert micro.values_N is not None and micro.returns_N is not None
        alpha = self.config.router.balance_alpha
        balances = balances_of(micro, with_loss=alpha > 0)
        values_N = self.engine.module(micro, balances)
        loss_N = value_loss(values_N, micro.values_N, micro.returns_N, self.ppo.value_clip)
        loss = (micro.weights_N * loss_N).sum()
        if not alpha:
            return loss
        return loss + alpha * micro.balance_weight * (balances[0].total() + balances[1].total())


def _show_means(groups: Sequence[Group], rollouts: Sequence[Rollout]) -> None:
    """Each completion's mean advantage as its group's, where rows of rollouts are made from."""
    means = iter([fmean(r.estimate.advantages) if r.scored and r.estimate else 0.0 for r in rollouts])
    for group in groups:
        group.advantages = [next(means) for _ in group.completions]
