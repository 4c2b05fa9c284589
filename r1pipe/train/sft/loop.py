"""The training loop of pretrain, cold_start, control_sft, rejection_sft and distill."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from r1pipe.config import FineTuneConfig, PretrainConfig
from r1pipe.data.packing import Packed, chunks, collate, epoch_batches, share
from r1pipe.runs import heartbeat, stopping
from r1pipe.runs.stopping import Interrupted
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.metrics import shown, step_metrics
from r1pipe.train.run import Run
from r1pipe.train.sft.losses import loss_sums

F = TypeVar("F", bound=FineTuneConfig)

# The batches after a step: (rows of all ranks together, position in the data behind them). Called with the
# step and the position saved with it, so that a resumed run sees what an uninterrupted one would have seen.
# A position is plain values, or None where the step alone determines the batches.
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
    begun, state = run.resume(engine)
    weights = TermWeights(stage.mtp_weight, stage.router.balance_alpha)
    stream = batches(begun, state.get("position"))
    for step, (batch, position) in zip(range(begun + 1, total_steps + 1), stream, strict=False):
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
        leaving = stopping.agreed(engine)
        if step == total_steps or leaving or (stage.save_every and step % stage.save_every == 0):
            run.save_checkpoint(engine, step, {"position": position})
        if leaving and step < total_steps:
            raise Interrupted(leaving)
    return run.folder.checkpoint(total_steps)


@dataclass(frozen=True)
class TermWeights:
    """What the terms beside the next token's cross-entropy weigh; 0: they are not computed."""

    mtp: float
    balance: float


class Shares:
    """One optimizer step's loss, cut into this rank's micro-batches.

    The loss is the mean of the cross-entropy, and of the multi-token prediction loss, over the whole batch's
    learned tokens, and of the balance loss over all its tokens, whatever the micro-batches and ranks.
    """

    def __init__(self, engine: Engine, batch: list[Packed], weights: TermWeights, pad_id: int):
        self.engine, self.batch, self.weights, self.pad_id = engine, batch, weights, pad_id
        # the engine averages over ranks: the sum of all shares is the mean
        self.per_learned = engine.world_size / max(1, sum(row.learned for row in batch))
        self.per_token = engine.world_size / max(1, sum(len(row.tokens) for row in batch))
        self.mtp: list[float] = []  # this rank's shares of the terms, unweighted
        self.balance: list[float] = []

    def micro_losses(self, accumulation: int) -> list[Callable[[], Tensor]]:
        """This rank's micro-batches, each giving its share of the loss."""
        mine = share(self.batch, self.engine.rank, self.engine.world_size)
        return [partial(self._share, rows) for rows in chunks(mine, accumulation)]

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
        named = {
            "mtp_loss": (self.mtp, self.weights.mtp),
            "balance_loss": (self.balance, self.weights.balance),
        }
        there = {name: term for name, term in named.items() if term[0]}
        if not there:
            return {"train/loss": loss}
        sums = self.engine.sum_over_ranks([sum(values) for values, _ in there.values()])
        means = [total / self.engine.world_size for total in sums]
        beside = sum(mean * weight for mean, (_, weight) in zip(means, there.values(), strict=True))
        found = dict(zip((f"train/{name}" for name in there), means, strict=True))
        return {"train/loss": loss - beside, **found}
