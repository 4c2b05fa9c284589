"""The loss of pre-training and SFT: mean cross-entropy over the learned tokens of the whole batch.

Axes: B rows, T tokens, N learned tokens, D hidden width.
"""

from torch import Tensor

from r1pipe.data.packing import Batch
from r1pipe.model import DeepseekV3
from r1pipe.model.logprobs import token_logprobs


def cross_entropy_sum(model: DeepseekV3, batch: Batch) -> Tensor:
    """Sum of -log p(token) over the tokens that are learned, in nats; scalar.

    Only the states that predict a learned token go through the head, so SFT pays for responses alone.
    """
    hidden_BTD = model.hidden(batch.tokens_BT, batch.segments_BT)
    learned_BT = batch.loss_BT[:, 1:]  # a document's first token is never learned: its state is another's
    hidden_ND = hidden_BTD[:, :-1][learned_BT]
    targets_N = batch.tokens_BT[:, 1:][learned_BT]
    return -token_logprobs(model.lm_head, hidden_ND, targets_N, model.config.vocab_size).sum()
