"""GRPO's loss as pure functions of tensors (DeepSeekMath, arXiv 2402.03300, section 4.1; R1 section 2.2).

Axes: N completion tokens of a micro-batch, one sequence after another; D hidden width; V vocabulary.
Nothing here knows of models, engines or ranks: a micro-batch's loss is a sum over its tokens with
`weights_N`, and the weights of all micro-batches of all ranks together make the mean.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def kl_unbiased(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """pi_ref/pi - log(pi_ref/pi) - 1 per token: never negative, KL(pi || pi_ref) on average over tokens drawn
    from pi (DeepSeekMath eq. 4)."""
    log_ratio_N = reference_N - logprobs_N
    return log_ratio_N.exp() - log_ratio_N - 1


def clipped_surrogate(ratio_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    """min(ratio A, clip(ratio, 1-e, 1+e) A) per token: what is maximised (DeepSeekMath eq. 3)."""
    return torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip) * advantages_N)


# What one token weighs in the loss, from its completion's length and the minibatch's completions and tokens.
LOSS_MEANS: dict[str, Callable[[int, float, float], float]] = {
    # over each sequence's tokens, then over sequences (DeepSeekMath eq. 3): a long one's tokens weigh less
    "sequence": lambda length, sequences, tokens: 1 / (length * sequences),
    # over all tokens of the minibatch (DAPO, arXiv 2503.14476, eq. 12): long completions weigh more
    "token": lambda length, sequences, tokens: 1 / tokens,
}


@dataclass
class PolicyLoss:
    """A micro-batch's share of the loss, and sums over its trained tokens for the metrics (no gradient)."""

    loss: Tensor  # scalar
    kl_sum: Tensor
    clipped_sum: Tensor  # tokens whose gradient the clip has cut
    gap_sum: Tensor  # |trainer's log-probability - sampler's|
    ratio_max: Tensor
    tokens: Tensor


def policy_loss(
    logprobs_N: Tensor,
    old_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    clip: float,
    reference_N: Tensor | None = None,
    kl_coef: float = 0.0,
) -> PolicyLoss:
    """GRPO's loss: sum over tokens of weight x (kl_coef x KL - clipped surrogate).

    `old_N` are the log-probabilities at sampling, `reference_N` those of the reference model (None: no KL).
    """
    ratio_N = (logprobs_N - old_N).exp()
    surrogate_N = clipped_surrogate(ratio_N, advantages_N, clip)
    kl_N = torch.zeros_like(logprobs_N) if reference_N is None else kl_unbiased(logprobs_N, reference_N)
    loss = (weights_N * (kl_coef * kl_N - surrogate_N)).sum()
    with torch.no_grad():
        trained_N = weights_N > 0
        clipped_N = trained_N & (surrogate_N < ratio_N * advantages_N)
        return PolicyLoss(
            loss=loss,
            kl_sum=(kl_N * trained_N).sum(),
            clipped_sum=clipped_N.sum(),
            gap_sum=((logprobs_N - old_N).abs() * trained_N).sum(),
            ratio_max=(ratio_N * trained_N).amax(),
            tokens=trained_N.sum(),
        )
