"""Drawing one token: temperature, nucleus, and a stream of uniform random numbers per completion.

Axes: S slots, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r1pipe.core.errors import ConfigError

LIKELIEST = 1024  # tokens of a row that a CPU sorts first


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn, with vLLM's names."""

    max_tokens: int  # longest completion, the end-of-sequence token counted
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # nucleus; 1 keeps every token
    n: int = 1  # completions per prompt
    seed: int = 0  # root of the random streams
    # Prompt i is number first + i * stride of all prompts, and that number alone selects its random numbers:
    # completions do not depend on how many ranks share the work.
    first: int = 0
    stride: int = 1
    ignore_eos: bool = False  # continue to max_tokens (for benchmarks)
    stop_token_ids: tuple[int, ...] = ()  # more tokens that end a completion, even with ignore_eos
    max_num_seqs: int = 256  # sequences decoded together on one rank
    record_experts: bool = False  # fill Completion.experts, where the sampler can

    def __post_init__(self) -> None:
        checks = {
            f"max_tokens={self.max_tokens} must be at least 1": self.max_tokens < 1,
            f"temperature={self.temperature} must not be negative": not self.temperature >= 0,
            f"top_p={self.top_p} must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"n={self.n} must be at least 1": self.n < 1,
            f"seed={self.seed} must be between 0 and 2^64-1": not 0 <= self.seed < 2**64,
        }
        for problem, failed in checks.items():
            if failed:
                raise ConfigError(f"sampling: {problem}")


def uniform_stream(seed: int, prompt: int, sample: int, length: int) -> np.ndarray:
    """`length` float32 numbers in [0, 1) that depend on nothing but (seed, prompt, sample)."""
    key = np.array([seed, prompt << 32 | sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(length, dtype=np.float32)


def draw(
    logits_SV: Tensor,
    uniform_S: Tensor,
    params: SamplingParams,
    logprobs_of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """-> tokens_S and their log-probabilities under softmax(logits / temperature), float32.

    Inverse-transform sampling: the first token whose cumulative probability exceeds the uniform number; one
    number a token instead of one per token and vocabulary entry. Greedy reports softmax(logits).
    A nucleus (top_p < 1) restricts what is drawn, not what is reported: the trainer's logits have none.
    `logprobs_of(logits_SV, tokens_S)` computes what is reported; None: the logarithm of the probability.
    """
    logits_SV = logits_SV.float()
    if params.temperature not in (0.0, 1.0):
        logits_SV = logits_SV / params.temperature
    probs_SV = logits_SV.softmax(dim=-1)
    if params.temperature == 0.0:
        tokens_S1 = probs_SV.argmax(dim=-1, keepdim=True)
    elif params.top_p < 1.0:
        tokens_S1 = _nucleus(probs_SV, uniform_S, params.top_p)
    else:
        tokens_S1 = _first_above(probs_SV.cumsum(dim=-1), uniform_S)
    tokens_S = tokens_S1.squeeze(1)
    if logprobs_of is not None:
        return tokens_S, logprobs_of(logits_SV, tokens_S)
    return tokens_S, probs_SV.gather(1, tokens_S1).squeeze(1).log()


def _nucleus(probs_SV: Tensor, uniform_S: Tensor, top_p: float) -> Tensor:
    """The token of each row that `uniform_S` selects among the likeliest that hold `top_p`, [S, 1].

    A CPU sorts only the likeliest tokens, which nearly always hold it: to sort 64 rows of 49,152 takes as
    long as a step of a model of 135M parameters. Each row's token depends on that row alone.
    """
    if probs_SV.device.type != "cpu" or probs_SV.shape[1] <= LIKELIEST:
        return _within(*probs_SV.sort(dim=-1, descending=True), uniform_S, top_p)
    likeliest = probs_SV.topk(LIKELIEST)
    tokens_S1 = _within(*likeliest, uniform_S, top_p)
    wider_S = likeliest.values.cumsum(dim=-1)[:, -1] < top_p
    if wider_S.any():
        whole = probs_SV[wider_S].sort(dim=-1, descending=True)
        tokens_S1[wider_S] = _within(*whole, uniform_S[wider_S], top_p)
    return tokens_S1


def _within(sorted_SV: Tensor, order_SV: Tensor, uniform_S: Tensor, top_p: float) -> Tensor:
    cumulative_SV = sorted_SV.cumsum(dim=-1)
    # by the mass before each token, so that the first is always inside
    outside_SV = cumulative_SV - sorted_SV >= top_p
    cumulative_SV = sorted_SV.masked_fill(outside_SV, 0.0).cumsum(dim=-1)
    return order_SV.gather(1, _first_above(cumulative_SV, uniform_S))


def _first_above(cumulative_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds uniform * total, [S, 1]; the product can round up to the
    total, where no index is above: just below it the last token with mass is."""
    total_S1 = cumulative_SV[:, -1:]
    below = torch.nextafter(total_S1, torch.zeros_like(total_S1))
    target_S1 = (uniform_S.unsqueeze(1) * total_S1).minimum(below)
    index_S1 = torch.searchsorted(cumulative_SV, target_S1, right=True)
    return index_S1.clamp_(max=cumulative_SV.shape[1] - 1)  # NaN has no index; the sampler checks logprobs
