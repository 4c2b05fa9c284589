"""The training loop of pretrain, cold_start, control_sft and rejection_sft."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from r1pipe.data.packing import Packed, chunks, collate, epoch_batches, share
from r1pipe.engine import Engine, StepStats
from r1pipe.model import max_vio
from r1pipe.run import Run
from r1pipe.sft.losses import cross_entropy_sum

# From a step on, the batches of each later step: rows of all ranks together. A function of the step alone, so
# that a resumed run sees the batches that an uninterrupted one would have seen.
Batches = Callable[[int], Iterator[list[Packed]]]


def steps_in(rows: int, batch_size: int, epochs: int, max_steps: int) -> int:
    """Optimizer steps of `epochs` passes over the rows, at most `max_steps` (0: no limit)."""
    steps = epochs * -(-rows // batch_size)
    return min(steps, max_steps) if max_steps else steps


def epochs_of(run: Run, rows: list[Packed], batch_size: int) -> Batches:
    """Endless passes over the rows, each in an order drawn from the run's "order" stream."""
    per_epoch = -(-len(rows) // batch_size)

    def batches(step: int) -> Iterator[list[Packed]]:
        epoch, skipped = divmod(step, per_epoch)
        while True:
            for index, batch in enumerate(epoch_batches(rows, batch_size, run.rng("order", epoch))):
                if index >= skipped:
                    yield batch
            epoch, skipped = epoch + 1, 0

    return batches


def train(
    run: Run,
    engine: Engine,
    batches: Batches,
    total_steps: int,
    pad_id: int,
    short_evaluation: Callable[[], dict[str, float]],
) -> Path:
    """Train from the newest checkpoint, or the start, to `total_steps`; the last checkpoint's folder."""
    stage = run.stage
    step, _ = run.resume(engine)
    begun = step
    for step, batch in enumerate(batches(begun), begun + 1):
        if step > total_steps:
            break
        started = time.monotonic()
        with run.phase("update"):
            stats = engine.train_step(
                micro_losses(engine, batch, run.config.engine.gradient_accumulation, pad_id)
            )
        tokens = sum(len(row.tokens) for row in batch)
        metrics = step_metrics(stats) | {"train/tokens_per_s": tokens / (time.monotonic() - started)}
        if stage.eval.every and step % stage.eval.every == 0 and step < total_steps:
            metrics |= short_evaluation()
        run.log(step, metrics)
        run.progress("train", step, total_steps, "steps", loss=stats.loss)
        if stage.save_every and step % stage.save_every == 0 and step < total_steps:
            run.save_checkpoint(engine, step, {})
    if begun < total_steps:
        run.save_checkpoint(engine, total_steps, {})
    return run.folder.checkpoint(total_steps)


def micro_losses(
    engine: Engine, batch: list[Packed], accumulation: int, pad_id: int
) -> list[Callable[[], Tensor]]:
    """This rank's micro-batches, each giving its share of the mean over the whole batch's learned tokens."""
    learned = max(1, sum(row.learned for row in batch))
    weight = engine.world_size / learned  # the engine averages over ranks: the sum of all shares is the mean
    return [
        partial(_share_of_loss, engine, rows, weight, pad_id)
        for rows in chunks(share(batch, engine.rank, engine.world_size), accumulation)
    ]


def _share_of_loss(engine: Engine, rows: list[Packed], weight: float, pad_id: int) -> Tensor:
    return cross_entropy_sum(engine.module, collate(rows, pad_id).to(engine.device)) * weight


def step_metrics(stats: StepStats) -> dict[str, float]:
    """What every optimizer step logs."""
    metrics = {"train/loss": stats.loss, "train/lr": stats.lr, "train/grad_norm": stats.grad_norm}
    if stats.loads_LE is not None:
        violation_L = max_vio(stats.loads_LE)
        metrics["router/max_vio"] = violation_L.max().item()
        metrics["router/max_vio_mean"] = violation_L.mean().item()
    return metrics
