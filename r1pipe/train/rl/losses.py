"""The losses of group-relative policy optimisation as pure functions of tensors.

GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1; R1 section 2.2) and what others made of it: Dr.GRPO (arXiv
2503.20783), DAPO (2503.14476), GSPO (2507.18071) and CISPO (2506.13585) differ in the ratio, in what is done
where it leaves the clip range, and in the mean; conf/stage/part/loss/ says which is what.

Axes: N completion tokens of a micro-batch, one sequence after another; B sequences; D hidden width; V
vocabulary. Nothing here knows of models, engines or ranks: a micro-batch's loss is a sum over its tokens with
`weights_N`, and the weights of all micro-batches of all ranks together make the mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# --- KL(pi || pi_ref) from tokens drawn from pi: Schulman, "Approximating KL divergence", 2020


def kl_plain(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """k1 = log(pi/pi_ref) per token: unbiased, may be negative.

    Inside the loss its gradient is grad log pi, which is zero on average: it pulls only in the reward.
    """
    return logprobs_N - reference_N


def kl_square(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """k2 = log(pi/pi_ref)^2 / 2 per token: biased, but inside the loss its gradient is, on average, KL's."""
    return (logprobs_N - reference_N) ** 2 / 2


def kl_unbiased(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """k3 = pi_ref/pi - log(pi_ref/pi) - 1 per token: never negative, KL(pi || pi_ref) on average over tokens
    drawn from pi (DeepSeekMath eq. 4)."""
    log_ratio_N = reference_N - logprobs_N
    return log_ratio_N.exp() - log_ratio_N - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl_plain,
    "k2": kl_square,
    "k3": kl_unbiased,
}

# --- the ratio, and what is maximised


def sequence_mean(values_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Each token gets the mean over its sequence: [N] -> [N]. With log ratios the logarithm of GSPO's ratio,
    (pi(y) / pi_old(y))^(1/|y|) (arXiv 2507.18071, eq. 7)."""
    means_B = torch.segment_reduce(values_N, "mean", lengths=lengths_B)
    return means_B.repeat_interleave(lengths_B, output_size=len(values_N))


def clipped_surrogate(ratio_N: Tensor, advantages_N: Tensor, clip: float, clip_high: float) -> Tensor:
    """min(ratio A, clip(ratio, 1-e, 1+e') A) per token: what is maximised (DeepSeekMath eq. 3, where both
    bounds are alike; DAPO eq. 10, where the upper one is higher)."""
    return torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip_high) * advantages_N)


def cispo_surrogate(
    ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, clip: float, clip_high: float
) -> Tensor:
    """sg(clip(ratio, 1-e, 1+e')) A log pi per token (CISPO, arXiv 2506.13585, eq. 4 and 5): the weight of a
    token is bounded, its gradient never dropped. With clip=1 there is no lower bound."""
    return ratio_N.detach().clamp(1 - clip, 1 + clip_high) * advantages_N * logprobs_N


# What one token weighs in the loss, from its completion's length, the minibatch's completions and tokens, and
# the longest completion that is allowed.
LOSS_MEANS: dict[str, Callable[[int, float, float, int], float]] = {
    # over each sequence's tokens, then over sequences (DeepSeekMath eq. 3): a long one's tokens weigh less
    "sequence": lambda length, sequences, tokens, longest: 1 / (length * sequences),
    # over all tokens of the minibatch (DAPO, arXiv 2503.14476, eq. 12): long completions weigh more
    "token": lambda length, sequences, tokens, longest: 1 / tokens,
    # a sum over each sequence's tokens by one constant for all (Dr.GRPO, arXiv 2503.20783, section 3.2): a
    # token weighs the same in every minibatch
    "constant": lambda length, sequences, tokens, longest: 1 / (longest * sequences),
}


@dataclass(frozen=True)
class Objective:
    """Which loss it is; the fields are the config's keys under `stage` (see RLConfig)."""

    ratio: str  # "token" or "sequence"
    surrogate: str  # "clipped" or "cispo"
    clip: float
    clip_high: float
    kl_estimator: str  # one of KL_ESTIMATORS
    kl_coef: float  # of the KL inside the loss
    importance_cap: float


@dataclass
class PolicyLoss:
    """A micro-batch's share of the loss, and sums over its trained tokens for the metrics (no gradient)."""

    loss: Tensor  # scalar
    kl_sum: Tensor
    clipped_sum: Tensor  # tokens whose gradient (weighted: whose weight) the clip has cut
    clipped_low_sum: Tensor  # those of them whose ratio was too low
    capped_sum: Tensor  # tokens whose importance was truncated
    gap_sum: Tensor  # |trainer's log-probability - sampler's|
    gap_max: Tensor
    ratio_sum: Tensor  # what the clip looks at; without any trained token inf is the least, 0 the greatest
    ratio_min: Tensor
    ratio_max: Tensor
    sampling_ratio_sum: Tensor  # the trainer's probability over the sampler's
    sampling_ratio_min: Tensor
    sampling_ratio_max: Tensor
    tokens: Tensor


def policy_loss(
    logprobs_N: Tensor,
    old_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    lengths_B: Tensor,
    objective: Objective,
    reference_N: Tensor | None = None,
    trainer_N: Tensor | None = None,
) -> PolicyLoss:
    """Sum over tokens of weight x (kl_coef x KL - importance x surrogate).

    `old_N` are the sampler's log-probabilities, `reference_N` the reference model's (None: no KL). With
    `trainer_N`, the trainer's own of the weights that were sampled from, the ratio is to these, and
    min(pi_trainer / pi_sampler, importance_cap) makes up for the sampler's being another: truncated
    importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training").
    """
    log_ratio_N = logprobs_N - (old_N if trainer_N is None else trainer_N)
    if objective.ratio == "sequence":
        log_ratio_N = sequence_mean(log_ratio_N, lengths_B)
    ratio_N = log_ratio_N.exp()
    bounds = (objective.clip, objective.clip_high)
    if objective.surrogate == "cispo":
        surrogate_N = cispo_surrogate(ratio_N, logprobs_N, advantages_N, *bounds)
        clipped_N = ratio_N.clamp(1 - objective.clip, 1 + objective.clip_high) != ratio_N
    else:
        surrogate_N = clipped_surrogate(ratio_N, advantages_N, *bounds)
        clipped_N = surrogate_N < ratio_N * advantages_N
    capped_N = torch.zeros_like(clipped_N)
    if trainer_N is not None:
        importance_N = (trainer_N - old_N).exp()
        capped_N = importance_N > objective.importance_cap
        surrogate_N = importance_N.clamp(max=objective.importance_cap) * surrogate_N
    kl_N = torch.zeros_like(logprobs_N)
    if reference_N is not None:
        kl_N = KL_ESTIMATORS[objective.kl_estimator](logprobs_N, reference_N)
    loss = (weights_N * (objective.kl_coef * kl_N - surrogate_N)).sum()
    with torch.no_grad():
        trained_N = weights_N > 0
        others_N = ~trained_N
        gap_N = (logprobs_N - old_N).masked_fill(others_N, 0.0)
        ratio_N = ratio_N.masked_fill(others_N, 0.0)
        sampling_ratio_N = gap_N.exp().masked_fill(others_N, 0.0)
        return PolicyLoss(
            loss=loss,
            kl_sum=(kl_N * trained_N).sum(),
            clipped_sum=(trained_N & clipped_N).sum(),
            clipped_low_sum=(trained_N & clipped_N & (ratio_N < 1)).sum(),
            capped_sum=(trained_N & capped_N).sum(),
            gap_sum=gap_N.abs().sum(),
            gap_max=gap_N.abs().amax(),
            ratio_sum=ratio_N.sum(),
            ratio_min=ratio_N.masked_fill(others_N, math.inf).amin(),
            ratio_max=ratio_N.amax(),
            sampling_ratio_sum=sampling_ratio_N.sum(),
            sampling_ratio_min=sampling_ratio_N.masked_fill(others_N, math.inf).amin(),
            sampling_ratio_max=sampling_ratio_N.amax(),
            tokens=trained_N.sum(),
        )
