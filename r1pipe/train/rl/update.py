"""One rollout batch into optimizer steps: minibatches, inner epochs, and the frozen reference for the KL.

Axes: P prompts, B rows, T columns, N completion tokens of a micro-batch; L MoE layers, K experts of a token.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from r1pipe.config import EngineConfig, RLConfig
from r1pipe.model import Balance, Policy
from r1pipe.model.hf import HFTrunk
from r1pipe.model.transformer import Trunk
from r1pipe.runs import heartbeat
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.frozen import FrozenModel
from r1pipe.train.engine.metrics import StepStats, step_metrics
from r1pipe.train.engine.passes import Pass
from r1pipe.train.engine.writing import Writer
from r1pipe.train.rl.batch import MicroBatch, Rollout, by_prompt, collate, micro_batches, split_evenly
from r1pipe.train.rl.losses import KL_ESTIMATORS, policy_loss

Balances = tuple[Balance, Balance]  # of prompts and of rows


def balances_of(micro: MicroBatch, with_loss: bool, replay: bool = False) -> Balances:
    """Of prompts and of rows: each prompt and each completion counts as one sequence. `replay`: the rows'
    tokens go through the experts that the sampler chose (routing replay); of prompts none are recorded."""
    return (
        Balance.of_lengths(micro.prompt_lengths_P, micro.prompts_PT.shape[1], with_loss),
        Balance.of_lengths(
            micro.lengths_B, micro.tokens_BT.shape[1], with_loss, micro.experts_LNK if replay else None
        ),
    )


def completion_hidden(trunk: Trunk | HFTrunk, micro: MicroBatch, balances: Balances | None = None) -> Tensor:
    """hidden_ND before every completion token; `balances` (see `balances_of`) collect the balance losses."""
    balances = balances or balances_of(micro, with_loss=False)
    hidden_BTD = trunk.after_prompts(
        micro.prompts_PT, micro.prompt_lengths_P, micro.tokens_BT, micro.prompt_of_B, balances
    )
    heartbeat.tick()
    return hidden_BTD.flatten(0, 1).index_select(0, micro.sources_N)


def completion_logprobs(
    model: Policy, micro: MicroBatch, temperature: float, balances: Balances | None = None
) -> Tensor:
    """logprobs_N: log pi of every completion token, at the sampling temperature."""
    hidden_ND = completion_hidden(model.model, micro, balances)
    return model.lm_head(hidden_ND, micro.targets_N, temperature)


class Reference:
    """A frozen model, which the KL penalises distance from."""

    def __init__(self, model: Policy, config: EngineConfig):
        """`model`: a copy of the first policy, whose weights are now the reference's own."""
        model.drop_mtp()
        self.frozen = FrozenModel(model, config)
        self.device = self.frozen.device

    def logprobs(self, micros: Sequence[MicroBatch], temperature: float) -> list[Tensor]:
        """logprobs_N of each micro-batch; all ranks call. With its own choice of experts: a replayed one is
        that of the policy's router."""
        model = self.frozen.module
        return self.frozen.evaluate([logprobs_pass(model, micro, temperature) for micro in micros])

    def estimate_kl(self, rollouts: Sequence[Rollout], config: RLConfig) -> None:
        """Set each rollout's kl_T, for a KL in the reward (InstructGPT, arXiv 2203.02155, eq. 2)."""
        batches = by_prompt(rollouts, config.max_tokens_per_micro_batch)
        micros = [collate(rows, None, 0.0, self.device) for rows in batches]
        references = self.logprobs(micros, config.sampling.temperature)
        for rows, micro, reference_N in zip(batches, micros, references, strict=True):
            kl_N = KL_ESTIMATORS[config.kl_estimator](micro.old_N, reference_N)
            for rollout, kl_T in zip(rows, kl_N.split(micro.lengths_B.tolist()), strict=True):
                rollout.kl_T = kl_T

    def replace_by(self, engine: Engine) -> None:
        """Make the current policy the reference (R1 supplement: every 400 optimizer steps)."""
        self.frozen.copy(engine.module)

    def save(self, folder: Path, state: dict[str, Any], writer: Writer) -> None:
        """Write what `replace_by` has made the reference; all ranks call. It has no further `state`."""
        self.frozen.save(folder, writer)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; all ranks call. Raises CheckpointError."""
        self.frozen.load(folder)


def update(
    engine: Engine, rollouts: Sequence[Rollout], config: RLConfig, reference: Reference | None
) -> dict[str, float]:
    """Learn from this rank's share of a rollout batch; returns the metrics of all ranks.

    The sampler's log-probabilities are the old ones: it has the same weights in the same precision. How well
    that holds is sampling/sampling_logp_difference/mean; `stage.importance` corrects the difference.
    """
    minibatches = [
        prepare(engine, minibatch, config, reference)
        for minibatch in split_evenly(rollouts, config.minibatches)
    ]
    if config.importance != "none":
        for later in minibatches[1:]:  # the first is measured by its own step, before which no weight moves
            _measure(engine, later, config)
    steps = []
    for _ in range(config.inner_epochs):
        for micros in minibatches:
            steps.append(_optimizer_step(engine, micros, config))
    return _metrics(engine, steps, config, with_kl=reference is not None and config.kl_in == "loss")


def prepare(
    engine: Engine, minibatch: Sequence[Rollout], config: RLConfig, reference: Reference | None
) -> list[MicroBatch]:
    """This rank's micro-batches, with the reference's log-probabilities where the loss has a KL."""
    micros = micro_batches(engine, minibatch, config, config.loss_aggregation)
    if reference is not None and config.kl_in == "loss":
        found = reference.logprobs(micros, config.sampling.temperature)
        for micro, reference_N in zip(micros, found, strict=True):
            micro.reference_N = reference_N
    return micros


def logprobs_pass(
    model: Policy, micro: MicroBatch, temperature: float, replay: bool = False
) -> Pass[MicroBatch]:
    """A pass that gives logprobs_N; `replay` as in `balances_of`."""

    def learn(model: Policy, micro: MicroBatch, hidden_ND: Tensor, balances: Balances) -> tuple[Tensor, None]:
        return model.lm_head(hidden_ND, micro.targets_N, temperature), None

    return Pass(model, micro, partial(read, with_loss=False, replay=replay), learn)


def read(model: Policy, micro: MicroBatch, with_loss: bool, replay: bool) -> tuple[Tensor, Balances]:
    """hidden_ND before every completion token, and what collects the balance losses."""
    balances = balances_of(micro, with_loss, replay)
    return completion_hidden(model.model, micro, balances), balances


def _measure(engine: Engine, micros: Sequence[MicroBatch], config: RLConfig) -> None:
    """Set each micro-batch's trainer_N: call it while the weights are those that were sampled from."""
    temperature, replay = config.sampling.temperature, config.replay_routing
    found = engine.evaluate([logprobs_pass(engine.module, m, temperature, replay) for m in micros])
    for micro, trainer_N in zip(micros, found, strict=True):
        micro.trainer_N = trainer_N


@dataclass
class _Step:
    """One optimizer step, and what this rank's micro-batches measured in it."""

    stats: StepStats
    sums: dict[str, float]  # of PolicyLoss
    extremes: dict[str, list[float]]  # of PolicyLoss, one of each micro-batch
    balance: float | None  # share of the mean balance loss; None where it is not in the loss


def _optimizer_step(engine: Engine, micros: Sequence[MicroBatch], config: RLConfig) -> _Step:
    alpha, with_trainer = config.router.balance_alpha, config.importance != "none"

    def learn(
        model: Policy, micro: MicroBatch, hidden_ND: Tensor, balances: Balances
    ) -> tuple[Tensor, tuple[Any, ...]]:
        logprobs_N = model.lm_head(hidden_ND, micro.targets_N, config.sampling.temperature)
        trainer_N = micro.trainer_N
        if with_trainer and trainer_N is None:
            trainer_N = logprobs_N.detach()
        result = policy_loss(
            logprobs_N,
            micro.old_N,
            micro.advantages_N,
            micro.weights_N,
            micro.lengths_B,
            config,
            micro.reference_N,
            trainer_N,
        )
        return result.loss, (result.sums, result.extremes, trainer_N)

    reading = partial(read, with_loss=alpha > 0, replay=config.replay_routing)
    passes = [Pass(engine.module, m, reading, learn, alpha, m.balance_weight) for m in micros]
    stats = engine.train_step(passes)
    sums, extremes, trainers = zip(*(one.found for one in passes), strict=True)
    for micro, trainer_N in zip(micros, trainers, strict=True):
        micro.trainer_N = trainer_N if trainer_N is None else trainer_N.to(engine.device)
    return _Step(
        stats,
        {name: float(sum(of_micro[name].item() for of_micro in sums)) for name in sums[0]},
        {name: [of_micro[name].item() for of_micro in extremes] for name in extremes[0]},
        sum(one.balance.item() for one in passes if one.balance is not None) if alpha else None,
    )


def _metrics(engine: Engine, steps: Sequence[_Step], config: RLConfig, with_kl: bool) -> dict[str, float]:
    """Metrics over the steps that were not skipped."""
    first, last = steps[0], step_metrics(steps[-1].stats)
    steps = [step for step in steps if not step.stats.broken]
    if not steps:
        return last
    by_step = [step_metrics(step.stats) for step in steps]
    metrics = {name: fmean(values[name] for values in by_step) for name in by_step[0]}
    metrics |= {name: value for name, value in last.items() if name == "train/skipped"}

    def sum_over_ranks(steps: Sequence[_Step]) -> tuple[dict[str, float], float]:
        """The sums of PolicyLoss, and the count of tokens to divide them by."""
        totals = {name: sum(step.sums[name] for step in steps) for name in steps[0].sums}
        sums = dict(zip(totals, engine.sum_over_ranks([*totals.values()]), strict=True))
        return sums, max(sums["tokens"], 1.0)

    sums, count = sum_over_ranks(steps)
    if first.balance is not None:
        balances = engine.sum_over_ranks([step.balance or 0.0 for step in steps])
        metrics["train/balance_loss"] = fmean(balances) / engine.world_size
    if with_kl:  # a KL in the reward is measured on the completions (rows.summarise)
        metrics["kl"] = sums["kl"] / count
    if config.importance != "none":
        what = "masked" if config.importance.endswith("mask") else "capped"
        metrics[f"sampling/importance_sampling_ratio/{what}"] = sums["beyond"] / count
    if not first.stats.broken:  # in the first step the trainer's weights are the sampler's
        of_first, first_count = sum_over_ranks([first])
        metrics["sampling/importance_sampling_ratio/mean"] = of_first["sampling_ratio"] / first_count
        metrics["sampling/sampling_logp_difference/mean"] = of_first["gap"] / first_count
    metrics |= {
        "clip_ratio/region_mean": sums["clipped"] / count,
        "clip_ratio/low_mean": sums["clipped_low"] / count,
        "clip_ratio/high_mean": (sums["clipped"] - sums["clipped_low"]) / count,
        "importance_ratio/mean": sums["ratio"] / count,
    }
    return metrics | (_extremes(engine, steps, first) if sums["tokens"] else {})


def _extremes(engine: Engine, steps: Sequence[_Step], first: _Step) -> dict[str, float]:
    """Over the trained tokens of all ranks; those of the sampler from the first step."""
    found: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        for name, values in step.extremes.items():
            if step is first or not name.startswith("sampling/"):
                found[name] += values
    extreme = {name: min if name.endswith("/min") else max for name in found}
    of_ranks = engine.all_gather_objects({name: extreme[name](values) for name, values in found.items()})
    return {name: extreme[name](of_rank[name] for of_rank in of_ranks) for name in found}
