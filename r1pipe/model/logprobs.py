"""Log-probabilities of target tokens without all [tokens, vocabulary] logits in memory.

Axes: N tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable

from torch import Tensor, cat
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from r1pipe.model.kernels import training as kernels
from r1pipe.model.layers import Linear

LOGITS_IN_MEMORY = 2**25  # the part of [N, V] that a forward pass holds at once (128 MiB in float32)


class Head(Linear):
    """Gives logits, [..., D] -> [..., V], or the log-probabilities of `targets_N`, [N, D] -> [N].

    The latter calls the CPU kernel inside forward, the only place where ZeRO-3 has the weight.
    """

    def forward(self, x: Tensor, targets_N: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        if targets_N is None:
            return super().forward(x)
        return kernels.logprobs(x, self.weight, targets_N, temperature)


def _chunk_logprobs(
    head: Callable[[Tensor], Tensor], hidden_ND: Tensor, targets_N: Tensor, temperature: float
) -> Tensor:
    logits_NV = head(hidden_ND).float()
    if temperature != 1.0:  # dividing by one would copy [N, V]
        logits_NV = logits_NV / temperature
    return -cross_entropy(logits_NV, targets_N, reduction="none")


def token_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
) -> Tensor:
    """log pi(target) of each token, as logprobs_N in float32, from the hidden state that predicts it.

    `temperature` divides the logits, as in sampling. Long batches are split into chunks, whose logits are
    recomputed in the backward pass.
    """
    if isinstance(head, Head) and kernels.usable(hidden_ND, vocab_size):
        return head(hidden_ND, targets_N, temperature)
    chunk = max(1, LOGITS_IN_MEMORY // vocab_size)
    if hidden_ND.shape[0] <= chunk:
        return _chunk_logprobs(head, hidden_ND, targets_N, temperature)
    parts = [
        checkpoint(_chunk_logprobs, head, hidden, targets, temperature, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    return cat(parts)
