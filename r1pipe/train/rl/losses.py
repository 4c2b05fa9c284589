"""The losses of group-relative policy optimisation, and PPO's value loss, as pure functions of tensors.

GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1; R1 section 2.2) and its successors: Dr.GRPO (arXiv
2503.20783), DAPO (2503.14476), GSPO (2507.18071) and CISPO (2506.13585) differ in the ratio, in how it is
clipped, and in the mean; conf/stage/part/loss/ says which is which.

Axes: N completion tokens of a micro-batch, one sequence after another; B sequences; V vocabulary. A
micro-batch's loss is a sum over its tokens with `weights_N`; the weights of all micro-batches of all ranks
together make the mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from r1pipe.config import RLConfig

# --- KL(pi || pi_ref) from tokens drawn from pi: Schulman, "Approximating KL divergence", 2020


def kl_k1(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """k1 = log(pi/pi_ref) per token: unbiased, may be negative. Inside the loss its gradient, grad log pi, is
    zero on average: it pulls only in the reward."""
    return logprobs_N - reference_N


def kl_k2(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """k2 = log(pi/pi_ref)^2 / 2 per token: biased, but inside the loss its gradient is, on average, KL's."""
    return (logprobs_N - reference_N) ** 2 / 2


def kl_k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """k3 = pi_ref/pi - log(pi_ref/pi) - 1 per token: never negative, KL(pi || pi_ref) on average over tokens
    drawn from pi (DeepSeekMath eq. 4)."""
    log_ratio_N = reference_N - logprobs_N
    return log_ratio_N.exp() - log_ratio_N - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
}

# --- the policy's loss


def clipped_surrogate(ratio_N: Tensor, advantages_N: Tensor, clip: float, clip_high: float) -> Tensor:
    """min(ratio A, clip(ratio, 1-e, 1+e') A) per token (DeepSeekMath eq. 3 with equal bounds; DAPO eq. 10
    with a higher upper bound)."""
    return torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip_high) * advantages_N)


# A token's weight in the loss, from its completion's length, the minibatch's numbers of completions and of
# tokens, and the maximal length of a completion.
LOSS_AGGREGATIONS: dict[str, Callable[[int, float, float, int], float]] = {
    # mean over each sequence's tokens, then over sequences (DeepSeekMath eq. 3): long ones' tokens weigh less
    "sequence": lambda length, sequences, tokens, longest: 1 / (length * sequences),
    # mean over all tokens of the minibatch (DAPO, arXiv 2503.14476, eq. 12): long completions weigh more
    "token": lambda length, sequences, tokens, longest: 1 / tokens,
    # sum over each sequence's tokens, divided by one constant (Dr.GRPO, arXiv 2503.20783, section 3.2): a
    # token weighs the same in every minibatch
    "constant": lambda length, sequences, tokens, longest: 1 / (longest * sequences),
}


@torch.no_grad()
def importance_weights(log_ratio_N: Tensor, lengths_B: Tensor, config: RLConfig) -> tuple[Tensor, Tensor]:
    """Each token's weight by what the sampler's policy was, and whether it was beyond the bounds.

    `log_ratio_N` is log(pi_trainer / pi_sampler). By `config.importance`, the ratio is each token's own, or
    the sequence's for all its tokens: the product of theirs, or their geometric mean. Below importance_floor
    or above importance_cap it is truncated to the bound, or masked: set to 0 (TRL's
    vllm_importance_sampling_mode; IcePop, arXiv 2510.18855, is a token mask; conf/stage/part/importance/).
    """
    level, mode = config.importance.split("_")
    if level != "token":
        reduction = "sum" if level == "sequence" else "mean"
        of_each_B = torch.segment_reduce(log_ratio_N, reduction, lengths=lengths_B)
        log_ratio_N = of_each_B.repeat_interleave(lengths_B, output_size=len(log_ratio_N))
    ratio_N = log_ratio_N.exp()
    beyond_N = (ratio_N < config.importance_floor) | (ratio_N > config.importance_cap)
    if mode == "mask":
        return ratio_N.masked_fill(beyond_N, 0.0), beyond_N
    return ratio_N.clamp(config.importance_floor, config.importance_cap), beyond_N


@dataclass
class PolicyLoss:
    """A micro-batch's share of the loss, with statistics of its trained tokens for the metrics."""

    loss: Tensor  # scalar
    sums: dict[str, Tensor]  # over the tokens, without gradient
    extremes: dict[str, Tensor]  # metric, ending in /min or /max; without any trained token inf or 0


def policy_loss(
    logprobs_N: Tensor,
    old_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    lengths_B: Tensor,
    config: RLConfig,
    reference_N: Tensor | None = None,
    trainer_N: Tensor | None = None,
) -> PolicyLoss:
    """Sum over tokens of weight x (kl_coef x KL - importance x surrogate).

    `old_N` are the sampler's log-probabilities, `reference_N` the reference model's (None: no KL in the
    loss), `trainer_N` the trainer's own from before the update. With these, the ratio is relative to the
    trainer, as in decoupled PPO (Hilton et al., arXiv 2110.00641), and importance_weights correct for the
    sampler's difference.
    """
    clip, clip_high = config.clip, config.clip if config.clip_high is None else config.clip_high
    log_ratio_N = logprobs_N - (old_N if trainer_N is None else trainer_N)
    if config.ratio == "sequence":
        # the logarithm of GSPO's ratio, (pi(y) / pi_old(y))^(1/|y|) (arXiv 2507.18071, eq. 7)
        means_B = torch.segment_reduce(log_ratio_N, "mean", lengths=lengths_B)
        log_ratio_N = means_B.repeat_interleave(lengths_B, output_size=len(log_ratio_N))
    ratio_N = log_ratio_N.exp()
    if config.surrogate == "cispo":
        # sg(clip(ratio, 1-e, 1+e')) A log pi (arXiv 2506.13585, eq. 4 and 5): a token's weight is bounded,
        # its gradient never dropped; with clip=1 there is no lower bound
        weight_N = ratio_N.detach().clamp(1 - clip, 1 + clip_high)
        surrogate_N = weight_N * advantages_N * logprobs_N
        clipped_N = weight_N != ratio_N
    else:
        surrogate_N = clipped_surrogate(ratio_N, advantages_N, clip, clip_high)
        clipped_N = surrogate_N < ratio_N * advantages_N
    beyond_N = torch.zeros_like(clipped_N)
    if trainer_N is not None:
        importance_N, beyond_N = importance_weights(trainer_N - old_N, lengths_B, config)
        surrogate_N = importance_N * surrogate_N
    kl_N = torch.zeros_like(logprobs_N)
    if reference_N is not None:
        kl_N = KL_ESTIMATORS[config.kl_estimator](logprobs_N, reference_N)
    loss = (weights_N * (config.kl_coef * kl_N - surrogate_N)).sum()
    return PolicyLoss(
        loss, *_statistics(weights_N > 0, logprobs_N - old_N, ratio_N, kl_N, clipped_N, beyond_N)
    )


@torch.no_grad()
def _statistics(
    trained_N: Tensor, gap_N: Tensor, ratio_N: Tensor, kl_N: Tensor, clipped_N: Tensor, beyond_N: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The sums and extremes of a PolicyLoss; `gap_N` is log(pi_trainer / pi_sampler)."""
    others_N = ~trained_N
    gap_N = gap_N.masked_fill(others_N, 0.0)
    ratio_N = ratio_N.masked_fill(others_N, 0.0)
    sampling_ratio_N = gap_N.exp().masked_fill(others_N, 0.0)
    sums = {
        "tokens": trained_N.sum(),
        "kl": (kl_N * trained_N).sum(),
        "clipped": (trained_N & clipped_N).sum(),  # tokens whose gradient or weight was clipped
        "clipped_low": (trained_N & clipped_N & (ratio_N < 1)).sum(),
        "beyond": (trained_N & beyond_N).sum(),  # tokens whose importance was out of bounds
        "gap": gap_N.abs().sum(),
        "ratio": ratio_N.sum(),
        "sampling_ratio": sampling_ratio_N.sum(),
    }
    extremes = {
        "importance_ratio/min": ratio_N.masked_fill(others_N, math.inf).amin(),
        "importance_ratio/max": ratio_N.amax(),
        "sampling/importance_sampling_ratio/min": sampling_ratio_N.masked_fill(others_N, math.inf).amin(),
        "sampling/importance_sampling_ratio/max": sampling_ratio_N.amax(),
        "sampling/sampling_logp_difference/max": gap_N.abs().amax(),
    }
    return sums, extremes


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float | None) -> Tensor:
    """(V - R)^2 / 2 per token; with `clip` the maximum of that and the loss of V clipped to old +- clip, as
    in PPO's first implementation (Engstrom et al., arXiv 2005.12729, eq. 2)."""
    loss_N = (values_N - returns_N) ** 2
    if clip is not None:
        clipped_N = old_N + (values_N - old_N).clamp(-clip, clip)
        loss_N = torch.maximum(loss_N, (clipped_N - returns_N) ** 2)
    return loss_N / 2
