"""One rollout batch into optimizer steps: minibatches, inner epochs, and the frozen reference for the KL."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from r1pipe.config import EngineConfig, RLConfig
from r1pipe.model import Balance, DeepseekV3, load_pretrained, save_pretrained
from r1pipe.model.logprobs import token_logprobs
from r1pipe.model.training import set_precision
from r1pipe.runs import heartbeat
from r1pipe.train.engine.engine import Engine, StepStats
from r1pipe.train.engine.ranks import choose_device
from r1pipe.train.rl.batch import (
    MicroBatch,
    Rollout,
    by_prompt,
    collate,
    scored_counts,
    split_evenly,
    tokens_read,
    weights_of,
)
from r1pipe.train.rl.losses import Objective, PolicyLoss, policy_loss
from r1pipe.train.sft.loop import step_metrics


def completion_logprobs(
    model: DeepseekV3,
    micro: MicroBatch,
    temperature: float,
    balances: tuple[Balance, Balance] | None = None,
) -> Tensor:
    """log pi of every completion token of a micro-batch, logprobs_N, at the temperature of sampling.

    `balances` (see `balances_of`) collect the balance losses; none: they are not asked for.
    """
    hidden_BTD = model.model.after_prompts(
        micro.prompts_PT,
        micro.prompt_lengths_P,
        micro.tokens_BT,
        micro.prompt_of_B,
        balances or balances_of(micro, with_loss=False),
    )
    heartbeat.tick()
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, micro.sources_N)
    return token_logprobs(model.lm_head, hidden_ND, micro.targets_N, model.config.vocab_size, temperature)


class Reference:
    """A frozen copy of the policy that the KL pulls towards."""

    def __init__(self, policy: DeepseekV3, config: EngineConfig):
        """To be made before the engine, which may partition the policy's weights."""
        model = copy.deepcopy(policy)
        model.drop_mtp()
        device = choose_device(config.accelerator)
        model = model.to(device)
        if config.precision != "fp32":
            model = model.bfloat16()
        set_precision(model, config, device)
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch, temperature: float) -> Tensor:
        return completion_logprobs(self.model, micro, temperature)

    def replace_by(self, engine: Engine) -> None:
        """The policy of now becomes the reference (R1 supplement: every 400 optimizer steps)."""
        with engine.gathered() as policy:
            now = policy.state_dict()
            self.model.load_state_dict({name: now[name] for name in self.model.state_dict()})

    def save(self, folder: Path) -> None:
        save_pretrained(self.model, folder)

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_pretrained(folder).state_dict())


def objective_of(config: RLConfig) -> Objective:
    """The loss that the config asks for."""
    return Objective(
        ratio=config.ratio,
        surrogate=config.surrogate,
        clip=config.clip,
        clip_high=config.clip if config.clip_high is None else config.clip_high,
        kl_estimator=config.kl_estimator,
        kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
        importance_cap=config.importance_cap,
    )


def prepare(
    engine: Engine, minibatch: Sequence[Rollout], config: RLConfig, reference: Reference | None
) -> list[MicroBatch]:
    """A minibatch as this rank's micro-batches, with weights that make the mean over all ranks.

    To be called before the first update: it reads log-probabilities of the weights that were sampled from.
    """
    sequences, tokens, read = engine.sum_over_ranks([*scored_counts(minibatch), tokens_read(minibatch)])
    ranks = engine.world_size  # the engine averages over them
    micros = [
        collate(
            rollouts,
            weights_of(
                rollouts,
                config.loss_aggregation,
                sequences / ranks,
                tokens / ranks,
                config.sampling.max_tokens,
            ),
            ranks / read,
            engine.device,
        )
        for rollouts in by_prompt(minibatch, config.max_tokens_per_micro_batch)
    ]
    if reference is not None and config.kl_in == "loss":
        for micro in micros:
            micro.reference_N = reference.logprobs(micro, config.sampling.temperature)
    if config.importance_cap:
        # gathered, as ranks may have different numbers of micro-batches
        with engine.gathered() as policy, torch.no_grad():
            for micro in micros:
                micro.trainer_N = completion_logprobs(policy, micro, config.sampling.temperature)
    return micros


@dataclass
class _Step:
    stats: StepStats
    losses: list[PolicyLoss]
    balance: list[Tensor]  # this rank's shares of the mean balance loss, where it is in the loss

    def total(self, name: str) -> float:
        return float(sum(getattr(loss, name).item() for loss in self.losses))

    def least(self, name: str) -> float:
        return min(getattr(loss, name).item() for loss in self.losses)

    def greatest(self, name: str) -> float:
        return max(getattr(loss, name).item() for loss in self.losses)


def _optimizer_step(engine: Engine, micros: Sequence[MicroBatch], config: RLConfig) -> _Step:
    losses: list[PolicyLoss] = []
    shares: list[Tensor] = []
    alpha, objective = config.router.balance_alpha, objective_of(config)

    def share(micro: MicroBatch) -> Tensor:
        balances = balances_of(micro, with_loss=alpha > 0)
        logprobs_N = completion_logprobs(engine.module, micro, config.sampling.temperature, balances)
        result = policy_loss(
            logprobs_N,
            micro.old_N,
            micro.advantages_N,
            micro.weights_N,
            micro.lengths_B,
            objective,
            micro.reference_N,
            micro.trainer_N,
        )
        losses.append(replace(result, loss=result.loss.detach()))
        if not alpha:
            return result.loss
        balance = (balances[0].total() + balances[1].total()) * micro.balance_weight
        shares.append(balance.detach())
        return result.loss + alpha * balance

    closures: list[Callable[[], Tensor]] = [partial(share, micro) for micro in micros]
    stats, mine = engine.train_step(closures), len(micros)
    return _Step(stats, losses[:mine], shares[:mine])  # without the engine's repeats for ranks that have more


def balances_of(micro: MicroBatch, with_loss: bool) -> tuple[Balance, Balance]:
    """The balances of prompts and of rows: a prompt, and a completion, are each a sequence of their own."""
    return (
        Balance.of_lengths(micro.prompt_lengths_P, micro.prompts_PT.shape[1], with_loss),
        Balance.of_lengths(micro.lengths_B, micro.tokens_BT.shape[1], with_loss),
    )


def update(
    engine: Engine, rollouts: Sequence[Rollout], config: RLConfig, reference: Reference | None
) -> dict[str, float]:
    """Learn from one rank's share of a rollout batch; the metrics are those of all ranks.

    The old log-probabilities are the sampler's: the same weights in the same precision, so a forward pass to
    compute them again buys nothing. `sampling/sampling_logp_difference/mean` says how well that holds; where
    it does not, `stage.importance_cap` has the trainer compute its own and weighs the difference.
    """
    minibatches = [
        prepare(engine, minibatch, config, reference)
        for minibatch in split_evenly(rollouts, config.minibatches)
    ]
    steps = [
        _optimizer_step(engine, micros, config) for _ in range(config.inner_epochs) for micros in minibatches
    ]
    return _metrics(engine, steps, config, with_kl=reference is not None and config.kl_in == "loss")


def _metrics(engine: Engine, steps: Sequence[_Step], config: RLConfig, with_kl: bool) -> dict[str, float]:
    """Of the steps that moved the policy; one that was skipped has no numbers to show."""
    first = steps[0]  # before any step the trainer's policy is the sampler's
    last = step_metrics(steps[-1].stats)
    steps = [step for step in steps if not step.stats.broken]
    if not steps:
        return last
    names = ("tokens", "kl_sum", "clipped_sum", "clipped_low_sum", "capped_sum", "ratio_sum")
    of_first = ("tokens", "gap_sum", "sampling_ratio_sum")
    sums = [sum(step.total(name) for step in steps) for name in names]
    tokens, kl, clipped, clipped_low, capped, ratio, first_tokens, gap, sampling_ratio = (
        engine.sum_over_ranks([*sums, *map(first.total, of_first)])
    )
    count, first_count = max(tokens, 1.0), max(first_tokens, 1.0)
    by_step = [step_metrics(step.stats) for step in steps]
    metrics = {name: fmean(found[name] for found in by_step) for name in by_step[0]}
    metrics |= {name: value for name, value in last.items() if name == "train/skipped"}
    if first.balance:
        shares = [float(sum(share.item() for share in step.balance)) for step in steps]
        metrics["train/balance_loss"] = fmean(engine.sum_over_ranks(shares)) / engine.world_size
    if with_kl:  # in the reward it is measured with the completions (rows.kl_per_token)
        metrics["kl"] = kl / count
    if config.importance_cap:
        metrics["sampling/importance_sampling_ratio/capped"] = capped / count
    if not first.stats.broken:
        metrics["sampling/importance_sampling_ratio/mean"] = sampling_ratio / first_count
        metrics["sampling/sampling_logp_difference/mean"] = gap / first_count
    metrics |= {
        "clip_ratio/region_mean": clipped / count,
        "clip_ratio/low_mean": clipped_low / count,
        "clip_ratio/high_mean": (clipped - clipped_low) / count,
        "importance_ratio/mean": ratio / count,
    }
    return metrics | (_extremes(engine, steps, first) if tokens else {})


def _extremes(engine: Engine, steps: Sequence[_Step], first: _Step) -> dict[str, float]:
    """Least and greatest ratios over the trained tokens of all ranks; the sampler's of the first step."""
    mine = {
        "importance_ratio/min": min(step.least("ratio_min") for step in steps),
        "importance_ratio/max": max(step.greatest("ratio_max") for step in steps),
    }
    if not first.stats.broken:
        mine |= {
            "sampling/importance_sampling_ratio/min": first.least("sampling_ratio_min"),
            "sampling/importance_sampling_ratio/max": first.greatest("sampling_ratio_max"),
            "sampling/sampling_logp_difference/max": first.greatest("gap_max"),
        }
    of_ranks = engine.all_gather_objects(mine)
    return {name: (min if name.endswith("/min") else max)(found[name] for found in of_ranks) for name in mine}
