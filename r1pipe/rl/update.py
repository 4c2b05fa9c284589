"""One rollout batch into optimizer steps: minibatches, inner epochs, and the frozen reference for the KL."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from r1pipe.config.schema import EngineConfig, RLConfig
from r1pipe.engine import Engine, StepStats
from r1pipe.model import DeepseekV3, load_pretrained, save_pretrained
from r1pipe.model.logprobs import token_logprobs
from r1pipe.ranks import choose_device
from r1pipe.rl.batch import MicroBatch, Rollout, by_prompt, collate, scored_counts, split_evenly, weights_of
from r1pipe.rl.losses import PolicyLoss, policy_loss
from r1pipe.sft.loop import step_metrics


def completion_logprobs(model: DeepseekV3, micro: MicroBatch, temperature: float) -> Tensor:
    """log pi of every completion token of a micro-batch, logprobs_N, at the temperature of sampling."""
    hidden_BTD = model.hidden_after(
        micro.prompts_PT, micro.prompt_lengths_P, micro.tokens_BT, micro.prompt_of_B
    )
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, micro.sources_N)
    return token_logprobs(model.lm_head, hidden_ND, micro.targets_N, model.config.vocab_size, temperature)


class Reference:
    """A frozen copy of the policy that the KL pulls towards."""

    def __init__(self, policy: DeepseekV3, config: EngineConfig):
        """To be made before the engine, which may partition the policy's weights."""
        model = copy.deepcopy(policy).to(choose_device(config.accelerator))
        if config.precision == "bf16":
            model = model.bfloat16()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch, temperature: float) -> Tensor:
        return completion_logprobs(self.model, micro, temperature)

    def replace_by(self, engine: Engine) -> None:
        """The policy of now becomes the reference (R1 supplement: every 400 optimizer steps)."""
        with engine.gathered() as policy:
            self.model.load_state_dict(policy.state_dict())

    def save(self, folder: Path) -> None:
        save_pretrained(self.model, folder)

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_pretrained(folder).state_dict())


def prepare(
    engine: Engine, minibatch: Sequence[Rollout], config: RLConfig, reference: Reference | None
) -> list[MicroBatch]:
    """A minibatch as micro-batches, as many on every rank, with weights that make the mean over all ranks."""
    sequences, tokens = engine.sum_over_ranks(scored_counts(minibatch))
    ranks = engine.world_size  # the engine averages over them
    micros = [
        collate(
            rollouts, weights_of(rollouts, config.loss_mean, sequences / ranks, tokens / ranks), engine.device
        )
        for rollouts in by_prompt(minibatch, config.micro_tokens)
    ]
    missing = engine.agree_max(len(micros)) - len(micros)
    micros += [replace(micros[-1], weights_N=torch.zeros_like(micros[-1].weights_N))] * missing
    if reference is not None:
        for micro in micros:
            micro.reference_N = reference.logprobs(micro, config.sampling.temperature)
    return micros


@dataclass
class _Step:
    stats: StepStats
    losses: list[PolicyLoss]

    def total(self, name: str) -> float:
        return float(sum(getattr(loss, name).item() for loss in self.losses))


def _optimizer_step(engine: Engine, micros: Sequence[MicroBatch], config: RLConfig) -> _Step:
    losses: list[PolicyLoss] = []

    def share(micro: MicroBatch) -> Tensor:
        logprobs_N = completion_logprobs(engine.module, micro, config.sampling.temperature)
        result = policy_loss(
            logprobs_N,
            micro.old_N,
            micro.advantages_N,
            micro.weights_N,
            config.clip,
            micro.reference_N,
            config.kl_coef,
        )
        losses.append(replace(result, loss=result.loss.detach()))
        return result.loss

    closures: list[Callable[[], Tensor]] = [partial(share, micro) for micro in micros]
    return _Step(engine.train_step(closures), losses)


def update(
    engine: Engine, rollouts: Sequence[Rollout], config: RLConfig, reference: Reference | None
) -> dict[str, float]:
    """Learn from one rank's share of a rollout batch; the metrics are those of all ranks.

    The old log-probabilities are the sampler's: the same weights in the same precision, so a forward pass to
    compute them again would buy nothing. `train/logprob_gap` says how well that holds.
    """
    minibatches = [
        prepare(engine, minibatch, config, reference)
        for minibatch in split_evenly(rollouts, config.minibatches)
    ]
    steps = [
        _optimizer_step(engine, micros, config) for _ in range(config.inner_epochs) for micros in minibatches
    ]
    return _metrics(engine, steps)


def _metrics(engine: Engine, steps: Sequence[_Step]) -> dict[str, float]:
    first = steps[0]  # before any step the trainer's policy is the sampler's
    names = ("tokens", "kl_sum", "clipped_sum")
    sums = [sum(step.total(name) for step in steps) for name in names]
    tokens, kl, clipped, gap, first_tokens = engine.sum_over_ranks(
        [*sums, first.total("gap_sum"), first.total("tokens")]
    )
    ratio_max = max(loss.ratio_max.item() for step in steps for loss in step.losses)
    by_step = [step_metrics(step.stats) for step in steps]
    return {name: fmean(metrics[name] for metrics in by_step) for name in by_step[0]} | {
        "train/kl": kl / max(tokens, 1.0),
        "train/clip_fraction": clipped / max(tokens, 1.0),
        "train/ratio_max": max(engine.all_gather_objects(ratio_max)),
        "train/logprob_gap": gap / max(first_tokens, 1.0),
    }
