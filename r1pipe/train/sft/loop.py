"""The loss and the training loop of pre-training and of every SFT stage.

Axes: B rows, T tokens, N learned tokens, D hidden width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from r1pipe.chat.template import Chat
from r1pipe.config import FineTuneConfig, PretrainConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Demonstration
from r1pipe.data.packing import Batch, Packed, chunks, collate, epoch_batches, pack, share
from r1pipe.model import Balance, DeepseekV3, Policy
from r1pipe.model.mtp import mtp_loss_sum
from r1pipe.runs import heartbeat, stopping
from r1pipe.runs.record import Metrics
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.metrics import shown, step_metrics
from r1pipe.train.engine.passes import Pass
from r1pipe.train.finish import finish_stage, quick_evaluation
from r1pipe.train.loading import load_policy
from r1pipe.train.run import Run, log

F = TypeVar("F", bound=FineTuneConfig)

# The batches after a step, as (rows of all ranks together, position in the data after them). Called with the
# step and the position saved with it: plain values, or None if the step alone determines the batches.
Batches = Callable[[int, Any], Iterator[tuple[list[Packed], Any]]]


def fine_tune(
    run: Run[F], demonstrations: Sequence[Demonstration], data_hash: str, extra: Metrics | None = None
) -> None:
    """Train on the responses, from packing to record. `extra`: more metrics for the record. Raises DataError
    if no demonstration fits a row."""
    stage = run.stage
    rows = pack_demonstrations(run.chat, demonstrations, stage.sequence_length)
    steps = steps_in(len(rows), stage.batch_size, stage.epochs, stage.max_steps)
    model = load_policy(run)
    engine = Engine(model, stage.optim, stage.router, run.config.engine, steps)
    checkpoint = train(run, engine, epochs_of(run, rows, stage.batch_size), steps)
    finish_stage(run, engine, checkpoint, data_hash, extra)


def pack_demonstrations(chat: Chat, demonstrations: Sequence[Demonstration], length: int) -> list[Packed]:
    """Rows of packed examples whose loss covers the responses alone. Raises DataError if there are none."""
    if not demonstrations:
        raise DataError("this data has no worked solutions to train on; name another with data=NAME")
    examples = (
        chat.example(demonstration.prompt, demonstration.response) for demonstration in demonstrations
    )
    rows, dropped = pack(examples, length)
    if not rows:
        raise DataError(
            f"each of the {dropped} examples is longer than stage.sequence_length={length}; raise it"
        )
    kept, learned = len(demonstrations) - dropped, sum(row.learned for row in rows)
    log.info(
        f"{kept} demonstrations in {len(rows)} rows of {length} tokens, {learned} tokens learned; "
        f"{dropped} demonstrations are too long"
    )
    return rows


def steps_in(rows: int, batch_size: int, epochs: int, max_steps: int) -> int:
    """Optimizer steps of `epochs` passes over the rows, at most `max_steps` (0: no limit)."""
    steps = epochs * -(-rows // batch_size)
    return min(steps, max_steps) if max_steps else steps


def epochs_of(run: Run, rows: list[Packed], batch_size: int) -> Batches:
    """Endless passes over the rows, each in an order drawn from the run's "order" stream."""
    per_epoch = -(-len(rows) // batch_size)

    def batches(step: int, position: None) -> Iterator[tuple[list[Packed], None]]:
        for epoch in count(step // per_epoch):
            for number, batch in enumerate(epoch_batches(rows, batch_size, run.rng("order", epoch))):
                if epoch * per_epoch + number >= step:
                    yield batch, None

    return batches


def train(run: Run[PretrainConfig] | Run[F], engine: Engine, batches: Batches, total_steps: int) -> Path:
    """Train from the newest checkpoint, or the start, to `total_steps` or an early stop; the last folder."""
    stage = run.stage
    resumed, state = run.resume(engine)
    if run.is_last(resumed, total_steps, engine):
        return run.folder.checkpoint(resumed)
    stream = batches(resumed, state.get("position"))
    for step, (batch, position) in zip(range(resumed + 1, total_steps + 1), stream, strict=False):
        started = time.monotonic()
        heartbeat.at_step(step)
        with run.phase("update"):
            shares = Shares(engine, batch, stage.mtp_weight, stage.router.balance_alpha, run.chat.pad_id)
            stats = engine.train_step(shares.micro_losses(run.config.engine.gradient_accumulation))
        tokens = sum(len(row.tokens) for row in batch)
        metrics = step_metrics(stats) | ({} if stats.broken else shares.terms(stats.loss))
        metrics["train/tokens_per_s"] = tokens / (time.monotonic() - started)
        if stage.eval.every and step % stage.eval.every == 0 and step < total_steps:
            metrics |= quick_evaluation(run, engine, step)
        run.log(step, metrics)
        run.progress("train", step, total_steps, "steps", **shown(metrics))
        run.check_saved(engine)
        last, stop_signal = run.is_last(step, total_steps, engine), stopping.agreed(engine)
        if last or stop_signal or (stage.save_every and step % stage.save_every == 0):
            run.save_checkpoint(engine, step, {"position": position})
        if last:
            break
        if stop_signal:
            raise stopping.Interrupted(stop_signal)
    return run.folder.checkpoint(step)


def read(model: Policy, batch: Batch, with_balance: bool) -> tuple[Tensor, tuple[Balance]]:
    """hidden_BTD of a micro-batch, and what collects the balance loss of its documents."""
    balance = Balance(batch.segments_BT, with_loss=with_balance)
    return model.hidden(batch.tokens_BT, batch.segments_BT, balance), (balance,)


def loss_sums(
    model: Policy, batch: Batch, hidden_BTD: Tensor, balances: tuple[Balance], with_mtp: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of -log p of the learned tokens, in nats, and the same for the tokens after the next, mean over
    depths: None without `with_mtp`, or where the model has no layers for it. Only the states that predict a
    learned token go through the head, so SFT pays for responses alone."""
    tokens_BT, segments_BT = batch.tokens_BT, batch.segments_BT
    mtp = None
    if with_mtp and isinstance(model, DeepseekV3) and model.config.num_nextn_predict_layers:
        depths = model.model.mtp_hidden(hidden_BTD, tokens_BT, segments_BT, *balances)
        mtp = mtp_loss_sum(model.lm_head, depths, tokens_BT, segments_BT, batch.loss_BT)
    learned_BT = batch.loss_BT[:, 1:]  # no document's first token is learned
    hidden_ND, targets_N = hidden_BTD[:, :-1][learned_BT], tokens_BT[:, 1:][learned_BT]
    return -model.lm_head(hidden_ND, targets_N).sum(), mtp


class Shares:
    """One optimizer step's loss, split into this rank's micro-batches.

    Cross-entropy and multi-token prediction loss are means over the whole batch's learned tokens, the balance
    loss over all its tokens, for any number of micro-batches and ranks. A term of weight 0 is not computed.
    """

    def __init__(
        self, engine: Engine, batch: list[Packed], mtp_weight: float, balance_weight: float, pad_id: int
    ):
        self.engine, self.batch, self.pad_id = engine, batch, pad_id
        self.mtp_weight, self.balance_weight = mtp_weight, balance_weight
        # the engine averages over ranks: the sum of all shares is the mean
        self.per_learned = engine.world_size / max(1, sum(row.learned for row in batch))
        self.per_token = engine.world_size / max(1, sum(len(row.tokens) for row in batch))
        self.passes: list[Pass[Batch]] = []

    def micro_losses(self, accumulation: int) -> list[Pass[Batch]]:
        """This rank's micro-batches, each returning its share of the loss."""
        local = share(self.batch, self.engine.rank, self.engine.world_size)
        batches = (collate(rows, self.pad_id) for rows in chunks(local, accumulation))
        reading, device = partial(read, with_balance=self.balance_weight > 0), self.engine.device
        weights = self.balance_weight, self.per_token
        self.passes = [
            Pass(self.engine.module, batch.to(device), reading, self._learn, *weights) for batch in batches
        ]
        return self.passes

    def _learn(
        self, model: Policy, batch: Batch, hidden_BTD: Tensor, balances: tuple[Balance]
    ) -> tuple[Tensor, float | None]:
        """The loss without the balance loss, and the share of the mean MTP loss in it."""
        next_token, mtp = loss_sums(model, batch, hidden_BTD, balances, self.mtp_weight > 0)
        loss = next_token * self.per_learned
        if mtp is None:
            return loss, None
        mtp = mtp * self.per_learned
        return loss + self.mtp_weight * mtp, mtp.item()

    def terms(self, loss: float) -> dict[str, float]:
        """The metrics of a step's terms, all ranks together; `loss` is their weighted sum."""
        balances = [one.balance.item() for one in self.passes if one.balance is not None]
        terms = [
            ("train/mtp_loss", [one.found for one in self.passes if one.found is not None], self.mtp_weight),
            ("train/balance_loss", balances, self.balance_weight),
        ]
        computed = [term for term in terms if term[1]]
        if not computed:
            return {"train/loss": loss}
        sums = self.engine.sum_over_ranks([sum(shares) for _, shares, _ in computed])
        means = [total / self.engine.world_size for total in sums]
        added = sum(mean * weight for mean, (_, _, weight) in zip(means, computed, strict=True))
        return {"train/loss": loss - added, **dict(zip([name for name, *_ in computed], means, strict=True))}
