"""The loss of pre-training and SFT: mean cross-entropy over the learned tokens of the whole batch.

Axes: B rows, T tokens, N learned tokens, D hidden width.
"""

from dataclasses import dataclass

from torch import Tensor

from r1pipe.data.packing import Batch
from r1pipe.model import Balance, DeepseekV3
from r1pipe.model.logprobs import token_logprobs
from r1pipe.model.mtp import mtp_loss_sum


@dataclass
class Sums:
    """The unweighted terms of a micro-batch's loss; scalars, None if not requested."""

    next_token: Tensor  # -log p of the learned tokens, in nats
    mtp: Tensor | None  # the same for the tokens after the next, mean over depths
    balance: Tensor | None  # the balance loss of every token's document


def loss_sums(model: DeepseekV3, batch: Batch, with_mtp: bool, with_balance: bool) -> Sums:
    """The sums over a micro-batch; multi-token prediction only if the model has layers for it."""
    balance = Balance(batch.segments_BT, with_loss=with_balance)
    hidden_BTD = model.hidden(batch.tokens_BT, batch.segments_BT, balance)
    mtp = None
    if with_mtp and model.config.num_nextn_predict_layers:
        depths = model.model.mtp_hidden(hidden_BTD, batch.tokens_BT, batch.segments_BT, balance)
        mtp = mtp_loss_sum(
            model.lm_head,
            depths,
            batch.tokens_BT,
            batch.segments_BT,
            batch.loss_BT,
            model.config.vocab_size,
        )
    return Sums(cross_entropy_sum(model, hidden_BTD, batch), mtp, balance.total() if with_balance else None)


def cross_entropy_sum(model: DeepseekV3, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Sum of -log p(token) over the tokens that are learned, in nats; scalar.

    Only the states that predict a learned token go through the head, so SFT pays for responses alone.
    """
    learned_BT = batch.loss_BT[:, 1:]  # no document's first token is learned
    hidden_ND = hidden_BTD[:, :-1][learned_BT]
    targets_N = batch.tokens_BT[:, 1:][learned_BT]
    return -token_logprobs(model.lm_head, hidden_ND, targets_N, model.config.vocab_size).sum()
