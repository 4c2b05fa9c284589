"""The loss and the training loop of pre-training and of every SFT stage.

Axes: B rows, T tokens, N learned tokens, D hidden width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from r1pipe.chat.template import Chat
from r1pipe.config import FineTuneConfig, PretrainConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Demonstration
from r1pipe.data.packing import Batch, Packed, chunks, collate, epoch_batches, pack, share
from r1pipe.data.screening import Screening, said_in
from r1pipe.model import Balance, DeepseekV3, Policy
from r1pipe.model.mtp import mtp_loss_sum
from r1pipe.runs import heartbeat, samples, stopping
from r1pipe.runs.files import write_json
from r1pipe.runs.record import Metrics
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.metrics import shown, step_metrics
from r1pipe.train.engine.passes import Pass
from r1pipe.train.finish import finish_stage, quick_evaluation
from r1pipe.train.loading import load_policy
from r1pipe.train.run import Run, log

F = TypeVar("F", bound=FineTuneConfig)
MTP_LOSS, BALANCE_LOSS = "train/mtp_loss", "train/balance_loss"

# The batches after a step, as (rows of all ranks together, position in the data after them). Called with the
# step and the position saved with it: plain values, or None if the step alone determines the batches.
Batches = Callable[[int, Any], Iterator[tuple[list[Any], Any]]]


class StepLoss(Protocol):
    """The loss of one optimizer step on a batch, split into this rank's micro-batches."""

    tokens: int  # of the batch, on all ranks

    def micro_losses(self, accumulation: int) -> Sequence[Pass[Any]]:
        """What Engine.train_step takes, in at least `accumulation` parts where there is so much; all ranks
        call. They may know this loss, which does not keep them: a cycle would keep their micro-batches."""

    def terms(self, loss: float, passes: Sequence[Pass[Any]]) -> dict[str, float]:
        """The metrics of the step's terms, all ranks together, from `micro_losses` that were computed; `loss`
        is their weighted sum. All ranks call."""


def fine_tune(
    run: Run[F], demonstrations: Sequence[Demonstration], data_hash: str, extra: Metrics | None = None
) -> None:
    """Train on the responses, from packing to record. `extra`: more metrics for the record. Raises DataError
    if no demonstration fits a row."""
    stage, tokens_of = run.stage, list[int]()
    demonstrations = screened(run, demonstrations)
    rows = pack_demonstrations(run.chat, demonstrations, stage.sequence_length, tokens_of)
    note_trained_on(run, demonstrations, tokens_of)
    steps = steps_in(len(rows), stage.batch_size, stage.epochs, stage.max_steps)
    model = load_policy(run)
    engine = Engine(model, stage.optim, stage.router, run.config.engine, steps)
    checkpoint = train(run, engine, epochs_of(run, rows, stage.batch_size), steps)
    finish_stage(run, engine, checkpoint, data_hash, extra)


def pack_demonstrations(
    chat: Chat, demonstrations: Sequence[Demonstration], length: int, tokens_of: list[int] | None = None
) -> list[Packed]:
    """Rows of packed examples whose loss covers the responses alone; `tokens_of` is filled with the tokens of
    each. Raises DataError if there are none."""
    if not demonstrations:
        raise DataError("this data has no worked solutions to train on; name another with data=NAME")
    examples = [
        chat.example(demonstration.prompt, demonstration.response) for demonstration in demonstrations
    ]
    if tokens_of is not None:
        tokens_of += [len(example.tokens) for example in examples]
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


def screened(run: Run[F], demonstrations: Sequence[Demonstration]) -> list[Demonstration]:
    """The demonstrations that `screening` leaves, as it leaves them; what it found is in data/screening.json.
    Raises DataError where it leaves none."""
    screening = Screening(run.config.screening)
    kept = screening.demonstrations(demonstrations)
    if (
        run.rank == 0 and not run.folder.screening.exists()
    ):  # else these were looked over as they were written
        write_json(run.folder.screening, screening.report())
    for line in said_in(screening.report()):
        log.warning("%s; see %s", line, run.folder.screening)
    if demonstrations and not kept:
        raise DataError(
            f"screening dropped each of the {len(demonstrations)} demonstrations; look at them with "
            "`r1pipe data`, or give screening.identity.action=count screening.personal.action=count"
        )
    return kept


def note_trained_on(run: Run[F], demonstrations: Sequence[Demonstration], tokens_of: Sequence[int]) -> None:
    """Write down where each demonstration that fits a row came from."""
    if run.rank == 0:
        samples.write_trained_on(
            run.folder.trained_on,
            [
                (one, samples.kind_of(one.prompt), tokens)
                for one, tokens in zip(demonstrations, tokens_of, strict=True)
                if tokens <= run.stage.sequence_length
            ],
        )


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


def train(
    run: Run[PretrainConfig] | Run[F],
    engine: Engine,
    batches: Batches,
    total_steps: int,
    loss_of: Callable[[list[Any]], StepLoss] | None = None,
) -> Path:
    """Train from the newest checkpoint, or the start, to `total_steps` or an early stop; the last folder.

    `loss_of` a batch is next-token prediction, unless another is given.
    """
    stage = run.stage

    def next_token(batch: list[Packed]) -> StepLoss:
        return LMLoss(engine, batch, stage.mtp_weight, stage.router.balance_alpha, run.chat.pad_id)

    loss_of = loss_of or next_token
    resumed, state = run.resume(engine)
    if run.is_last(resumed, total_steps, engine):
        return run.folder.checkpoint(resumed)
    stream = batches(resumed, state.get("position"))
    for step, (batch, position) in zip(range(resumed + 1, total_steps + 1), stream, strict=False):
        started = time.monotonic()
        heartbeat.at_step(step)
        metrics, tokens = _optimizer_step(run, engine, batch, loss_of)
        metrics["train/tokens_per_s"] = tokens / (time.monotonic() - started)
        if stage.eval.every and step % stage.eval.every == 0 and step < total_steps:
            metrics |= quick_evaluation(run, engine, engine, step)
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


def _optimizer_step(
    run: Run[Any], engine: Engine, batch: list[Any], loss_of: Callable[[list[Any]], StepLoss]
) -> tuple[dict[str, float], int]:
    """The step's metrics, and the batch's tokens. It leaves nothing of the batch on the device."""
    with run.phase("update"):
        loss = loss_of(batch)
        passes = loss.micro_losses(run.config.engine.gradient_accumulation)
        stats = engine.train_step(passes)
    return step_metrics(stats) | ({} if stats.broken else loss.terms(stats.loss, passes)), loss.tokens


def read(model: Policy, batch: Batch, with_balance: bool) -> tuple[Tensor, tuple[Balance]]:
    """hidden_BTD of a micro-batch, and what collects the balance loss of its documents."""
    balance = Balance(batch.segments_BT, with_loss=with_balance)
    return model.hidden(batch.tokens_BT, batch.segments_BT, balance), (balance,)


def loss_sums(
    model: Policy, batch: Batch, hidden_BTD: Tensor, balances: tuple[Balance], with_mtp: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of -log p of the learned tokens, in nats, and that of `mtp_sum`: None without `with_mtp`. Only
    the states that predict a learned token go through the head, so SFT pays for responses alone."""
    mtp = mtp_sum(model, batch, hidden_BTD, balances) if with_mtp else None
    hidden_ND, targets_N = learned(batch, hidden_BTD)
    return -model.lm_head(hidden_ND, targets_N).sum(), mtp


def learned(batch: Batch, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """hidden_ND before each learned token, and the tokens; no document's first token is learned."""
    learned_BT = batch.loss_BT[:, 1:]
    return hidden_BTD[:, :-1][learned_BT], batch.tokens_BT[:, 1:][learned_BT]


def mtp_sum(model: Policy, batch: Batch, hidden_BTD: Tensor, balances: tuple[Balance]) -> Tensor | None:
    """The sum of -log p of the tokens after the next, in nats, mean over depths; None where the model has no
    layers for it."""
    if not isinstance(model, DeepseekV3) or not model.config.num_nextn_predict_layers:
        return None
    tokens_BT, segments_BT = batch.tokens_BT, batch.segments_BT
    depths = model.model.mtp_hidden(hidden_BTD, tokens_BT, segments_BT, *balances)
    return mtp_loss_sum(model.lm_head, depths, tokens_BT, segments_BT, batch.loss_BT)


def mean_terms(engine: Engine, passes: Sequence[Pass[Any]]) -> dict[str, float]:
    """What passes have found, by name, and their balance loss: each share summed over the passes, averaged
    over the ranks. All ranks call."""
    shares: dict[str, float] = {}
    for one in passes:
        balance = {} if one.balance is None else {BALANCE_LOSS: one.balance.item()}
        for name, share_of in (one.found | balance).items():
            shares[name] = shares.get(name, 0.0) + share_of
    if not shares:
        return {}
    sums = engine.sum_over_ranks([*shares.values()])
    return {name: total / engine.world_size for name, total in zip(shares, sums, strict=True)}


class LMLoss:
    """One optimizer step's loss, split into this rank's micro-batches.

    Cross-entropy and multi-token prediction loss are means over the whole batch's learned tokens, the balance
    loss over all its tokens, for any number of micro-batches and ranks. A term of weight 0 is not computed.
    """

    def __init__(
        self, engine: Engine, batch: list[Packed], mtp_weight: float, balance_weight: float, pad_id: int
    ):
        self.engine, self.batch, self.pad_id = engine, batch, pad_id
        self.mtp_weight, self.balance_weight = mtp_weight, balance_weight
        self.tokens, self.learned = sum(len(row.tokens) for row in batch), sum(row.learned for row in batch)
        # the engine averages over ranks: the sum of all shares is the mean
        self.per_learned = engine.world_size / max(1, self.learned)
        self.per_token = engine.world_size / max(1, self.tokens)

    def micro_losses(self, accumulation: int) -> list[Pass[Any]]:
        """This rank's micro-batches, each returning its share of the loss."""
        local = share(self.batch, self.engine.rank, self.engine.world_size)
        reading = partial(read, with_balance=self.balance_weight > 0)
        weights = self.balance_weight, self.per_token
        return [
            Pass(self.engine.module, batch, reading, self._learn, *weights)
            for batch in self._batches([*chunks(local, accumulation)])
        ]

    def _batches(self, micros: list[list[Packed]]) -> list[Any]:
        """This rank's micro-batches as tensors."""
        return [collate(rows, self.pad_id).to(self.engine.device) for rows in micros]

    def _learn(
        self, model: Policy, batch: Any, hidden_BTD: Tensor, balances: tuple[Balance]
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss without the balance loss, and the shares in it of what else is measured."""
        next_token, mtp = loss_sums(model, batch, hidden_BTD, balances, self.mtp_weight > 0)
        return self._with_mtp(next_token * self.per_learned, mtp)

    def _with_mtp(self, loss: Tensor, mtp: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        if mtp is None:
            return loss, {}
        mtp = mtp * self.per_learned
        return loss + self.mtp_weight * mtp, {MTP_LOSS: mtp.item()}

    def terms(self, loss: float, passes: Sequence[Pass[Any]]) -> dict[str, float]:
        """The metrics of a step's terms, all ranks together; `loss` is their weighted sum."""
        means = mean_terms(self.engine, passes)
        weights = {MTP_LOSS: self.mtp_weight, BALANCE_LOSS: self.balance_weight}
        added = sum(mean * weights.get(name, 0.0) for name, mean in means.items())
        return {"train/loss": loss - added, **means}
