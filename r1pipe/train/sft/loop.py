"""The training loop of pre-training and of every SFT stage."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from r1pipe.config import FineTuneConfig, PretrainConfig
from r1pipe.data.packing import Packed, chunks, collate, epoch_batches, share
from r1pipe.model import max_vio
from r1pipe.runs import heartbeat, stopping
from r1pipe.runs.stopping import Interrupted
from r1pipe.train.engine.engine import Engine, StepStats
from r1pipe.train.run import Run
from r1pipe.train.sft.losses import loss_sums

F = TypeVar("F", bound=FineTuneConfig)
EXPERTS_SHOWN = 64  # most experts of a layer whose loads are logged individually

# The batches after a step, as (rows of all ranks together, position in the data after them). Called with the
# step and the position saved with it: plain values, or None if the step alone determines the batches.
Batches = Callable[[int, Any], Iterator[tuple[list[Packed], Any]]]


def steps_in(rows: int, batch_size: int, epochs: int, max_steps: int) -> int:
    """Optimizer steps of `epochs` passes over the rows, at most `max_steps` (0: no limit)."""
    steps = epochs * -(-rows // batch_size)
    return min(steps, max_steps) if max_steps else steps


def epochs_of(run: Run, rows: list[Packed], batch_size: int) -> Batches:
    """Endless passes over the rows, each in an order drawn from the run's "order" stream."""
    per_epoch = -(-len(rows) // batch_size)

    def batches(step: int, position: None) -> Iterator[tuple[list[Packed], None]]:
        epoch, skipped = divmod(step, per_epoch)
        while True:
            for index, batch in enumerate(epoch_batches(rows, batch_size, run.rng("order", epoch))):
                if index >= skipped:
                    yield batch, None
            epoch, skipped = epoch + 1, 0

    return batches


def train(
    run: Run[PretrainConfig] | Run[F],
    engine: Engine,
    batches: Batches,
    total_steps: int,
    pad_id: int,
    quick_evaluation: Callable[[], dict[str, float]],
) -> Path:
    """Train from the newest checkpoint, or the start, to `total_steps`; the last checkpoint's folder."""
    stage = run.stage
    resumed, state = run.resume(engine)
    weights = TermWeights(stage.mtp_weight, stage.router.balance_alpha)
    stream = batches(resumed, state.get("position"))
    for step, (batch, position) in zip(range(resumed + 1, total_steps + 1), stream, strict=False):
        started = time.monotonic()
        heartbeat.at_step(step)
        with run.phase("update"):
            shares = Shares(engine, batch, weights, pad_id)
            stats = engine.train_step(shares.micro_losses(run.config.engine.gradient_accumulation))
        tokens = sum(len(row.tokens) for row in batch)
        metrics = step_metrics(stats) | ({} if stats.broken else shares.terms(stats.loss))
        metrics["train/tokens_per_s"] = tokens / (time.monotonic() - started)
        if stage.eval.every and step % stage.eval.every == 0 and step < total_steps:
            metrics |= quick_evaluation()
        run.log(step, metrics)
        run.progress("train", step, total_steps, "steps", **shown(metrics))
        stop_signal = stopping.agreed(engine)
        if step == total_steps or stop_signal or (stage.save_every and step % stage.save_every == 0):
            run.save_checkpoint(engine, step, {"position": position})
        if stop_signal and step < total_steps:
            raise Interrupted(stop_signal)
    return run.folder.checkpoint(total_steps)


@dataclass(frozen=True)
class TermWeights:
    """Weights of the terms added to the next token's cross-entropy; 0: the term is not computed."""

    mtp: float
    balance: float


class Shares:
    """One optimizer step's loss, split into this rank's micro-batches.

    Cross-entropy and multi-token prediction loss are means over the whole batch's learned tokens, the balance
    loss over all its tokens, for any number of micro-batches and ranks.
    """

    def __init__(self, engine: Engine, batch: list[Packed], weights: TermWeights, pad_id: int):
        self.engine, self.batch, self.weights, self.pad_id = engine, batch, weights, pad_id
        # the engine averages over ranks: the sum of all shares is the mean
        self.per_learned = engine.world_size / max(1, sum(row.learned for row in batch))
        self.per_token = engine.world_size / max(1, sum(len(row.tokens) for row in batch))
        self.mtp: list[float] = []  # this rank's shares of the terms, unweighted
        self.balance: list[float] = []

    def micro_losses(self, accumulation: int) -> list[Callable[[], Tensor]]:
        """This rank's micro-batches, each returning its share of the loss."""
        local = share(self.batch, self.engine.rank, self.engine.world_size)
        return [partial(self._share, rows) for rows in chunks(local, accumulation)]

    def _share(self, rows: list[Packed]) -> Tensor:
        batch = collate(rows, self.pad_id).to(self.engine.device)
        sums = loss_sums(self.engine.module, batch, self.weights.mtp > 0, self.weights.balance > 0)
        loss = sums.next_token * self.per_learned
        if sums.mtp is not None:
            mtp = sums.mtp * self.per_learned
            self.mtp.append(mtp.item())
            loss = loss + self.weights.mtp * mtp
        if sums.balance is not None:
            balance = sums.balance * self.per_token
            self.balance.append(balance.item())
            loss = loss + self.weights.balance * balance
        return loss

    def terms(self, loss: float) -> dict[str, float]:
        """The metrics of a step's terms, all ranks together; `loss` is their weighted sum."""
        terms = [
            ("train/mtp_loss", self.mtp, self.weights.mtp),
            ("train/balance_loss", self.balance, self.weights.balance),
        ]
        computed = [term for term in terms if term[1]]
        if not computed:
            return {"train/loss": loss}
        sums = self.engine.sum_over_ranks([sum(shares) for _, shares, _ in computed])
        means = [total / self.engine.world_size for total in sums]
        added = sum(mean * weight for mean, (_, _, weight) in zip(means, computed, strict=True))
        return {"train/loss": loss - added, **dict(zip([name for name, *_ in computed], means, strict=True))}


def shown(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of a step that the screen shows; a skipped step has no loss."""
    return {"loss": metrics["train/loss"]} if "train/loss" in metrics else {}


def step_metrics(stats: StepStats) -> dict[str, float]:
    """What every optimizer step logs. From the first skipped step on, `train/skipped` counts them; a skipped
    step logs only that and the learning rate.

    `router/max_vio` is the worst layer's, `router/max_vio/L` that of the MoE layer L (counted from 0), and
    `router/load/L/E` the load of its expert E over the layer's mean: 1 is even. Loads are left out for layers
    of more than EXPERTS_SHOWN experts.
    """
    skipped = {"train/skipped": float(stats.skipped)} if stats.skipped else {}
    if stats.broken:
        return {"train/lr": stats.lr, **skipped}
    metrics = {"train/loss": stats.loss, "train/lr": stats.lr, "train/grad_norm": stats.grad_norm}
    metrics |= skipped | stats.fp8
    if stats.loads_LE is None:
        return metrics
    used = [
        (n, loads_E) for n, loads_E in enumerate(stats.loads_LE) if loads_E.any()
    ]  # RL does not use MTP layers
    if used:
        violation_L = max_vio(torch.stack([loads_E for _, loads_E in used]))
        metrics["router/max_vio"] = violation_L.max().item()
        metrics["router/max_vio_mean"] = violation_L.mean().item()
        metrics |= {f"router/max_vio/{n}": v for (n, _), v in zip(used, violation_L.tolist(), strict=True)}
    for n, loads_E in used:
        if len(loads_E) <= EXPERTS_SHOWN:
            shares = (loads_E / loads_E.mean()).tolist()
            metrics |= {f"router/load/{n}/{expert}": round(load, 4) for expert, load in enumerate(shares)}
    return metrics
