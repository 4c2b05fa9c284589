"""The losses of distillation as pure functions: divergences of distributions, and rankings of answers.

Axes: N tokens, V vocabulary, K of them stored, C categories that two distributions share; P pairs of answers.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from r1pipe.config import DivergenceConfig, RankingConfig

# What is left beside stored probabilities is at least this much: they are rounded, and may add up to 1.
LEAST_LEFT_OVER = math.log(1e-7)
NOTHING, NO_LOGIT = -50.0, -1e4  # in place of log 0: a log-probability, and a logit

# --- distributions of the next token


def kl(logprobs_NC: Tensor, other_NC: Tensor) -> Tensor:
    """KL(p || q) per token, in nats, of log p and log q; both finite."""
    return (logprobs_NC.exp() * (logprobs_NC - other_NC)).sum(-1)


def divergence(student_NC: Tensor, teacher_NC: Tensor, kind: str, beta: float) -> Tensor:
    """How far the student is from the teacher, per token, in nats, from the log-probabilities of both.

    forward_kl is KL(teacher || student), which covers all that the teacher may say; reverse_kl is
    KL(student || teacher), which keeps to what the teacher finds likely (MiniLLM, arXiv 2306.08543).
    jensen_shannon lies between: beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
    m = beta teacher + (1 - beta) student (GKD, arXiv 2306.13649, eq. 1), 0 < beta < 1.
    """
    match kind:
        case "forward_kl":
            return kl(teacher_NC, student_NC)
        case "reverse_kl":
            return kl(student_NC, teacher_NC)
        case "jensen_shannon":
            mixture_NC = torch.logaddexp(student_NC + math.log1p(-beta), teacher_NC + math.log(beta))
            return beta * kl(teacher_NC, mixture_NC) + (1 - beta) * kl(student_NC, mixture_NC)
    raise ValueError(kind)


def of_vocabulary(student_NV: Tensor, teacher_NW: Tensor, config: DivergenceConfig) -> tuple[Tensor, Tensor]:
    """The divergence per token over the whole vocabulary, and KL(teacher || student) without gradient, from
    the logits of both.

    Models of one tokenizer may pad their vocabularies to different widths: the tokens that both have count.
    `temperature` divides both logits; the loss is not scaled by its square, as in GKD.
    """
    shared = min(student_NV.shape[-1], teacher_NW.shape[-1])
    student_NC, teacher_NC = (
        (logits[..., :shared].float() / config.temperature).log_softmax(-1)
        for logits in (student_NV, teacher_NW)
    )
    loss_N = divergence(student_NC, teacher_NC, config.kind, config.beta)
    return loss_N, kl(teacher_NC, student_NC).detach()


def of_stored(
    student_NV: Tensor, tokens_NK: Tensor, teacher_NK: Tensor, rest_N: Tensor, config: DivergenceConfig
) -> tuple[Tensor, Tensor]:
    """As of_vocabulary, over the tokens whose log-probabilities of the teacher were stored, and one category
    for all others, whose log-probability is `rest_N`. Token -1 is none; where there is none else, nothing is
    known, and the loss is 0.

    Merging categories never makes a divergence larger: this is a lower bound of the one over the vocabulary.
    Its gradient leaves the tokens that were not stored in proportion. There is no temperature: what is left
    over does not bear one.
    """
    logits_NV, is_token_NK = student_NV.float(), tokens_NK >= 0
    # in place of no token, the likeliest again: what is left over is that of all but the stored
    tokens_NK = torch.where(is_token_NK, tokens_NK, tokens_NK[:, :1].clamp(min=0))
    whole_N1 = logits_NV.logsumexp(-1, keepdim=True)
    others_N1 = logits_NV.scatter(-1, tokens_NK, NO_LOGIT).logsumexp(-1, keepdim=True)
    stored_NK = (logits_NV.gather(-1, tokens_NK) - whole_N1).masked_fill(~is_token_NK, NOTHING)
    student_NC = torch.cat([stored_NK, (others_N1 - whole_N1).clamp(min=NOTHING)], -1)
    known_NK = teacher_NK.float().masked_fill(~is_token_NK, NOTHING)
    teacher_NC = torch.cat([known_NK, rest_N.float().clamp(min=LEAST_LEFT_OVER)[:, None]], -1)
    is_known_N = is_token_NK.any(-1)
    loss_N = divergence(student_NC, teacher_NC, config.kind, config.beta) * is_known_N
    return loss_N, kl(teacher_NC, student_NC).detach() * is_known_N


# --- pairs of answers


def dpo_margins(
    chosen_P: Tensor,
    rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    beta: float,
) -> Tensor:
    """beta (log pi/pi_ref of the chosen - log pi/pi_ref of the rejected), from the answers' log-probabilities
    (sums over their tokens): by how much the chosen's implicit reward is higher (DPO, arXiv 2305.18290, eq.
    7)."""
    return beta * ((chosen_P - reference_chosen_P) - (rejected_P - reference_rejected_P))


def simpo_margins(
    chosen_P: Tensor,
    rejected_P: Tensor,
    chosen_lengths_P: Tensor,
    rejected_lengths_P: Tensor,
    beta: float,
) -> Tensor:
    """beta (log pi / |y| of the chosen - log pi / |y| of the rejected): means over tokens, so that a long
    answer is no better for its length, and no reference (SimPO, arXiv 2405.14734, eq. 4)."""
    return beta * (chosen_P / chosen_lengths_P - rejected_P / rejected_lengths_P)


def ranking_loss(margins_P: Tensor, config: RankingConfig) -> Tensor:
    """-log sigmoid(margin - target_margin) per pair (DPO eq. 7, with a target of 0; SimPO eq. 6)."""
    return -logsigmoid(margins_P - config.target_margin)


# --- tokens that the student drew


def teacher_advantages(old_T: Tensor, teacher_T: Tensor, coef: float, discount: float = 0.0) -> Tensor:
    """Advantages [T] of a completion's tokens: coef (log pi_teacher - log pi_student), minus the reverse KL's
    estimate k1, as a mean over the token and those that follow, whose weights fall by `discount` each.

    Without a discount the policy gradient is on average that of KL(student || teacher) at each token, the
    tokens before it taken as given (On-policy distillation, Thinking Machines Lab, 2025). With one a token
    also answers for where it leads (MiniLLM, arXiv 2306.08543, eq. 2).
    """
    advantages_T = teacher_T - old_T
    if discount:
        following, backwards = 0.0, []
        for gap in reversed(advantages_T.tolist()):
            following = gap + discount * following
            backwards.append(following)
        advantages_T = advantages_T.new_tensor(backwards[::-1])
    return coef * (1 - discount) * advantages_T
