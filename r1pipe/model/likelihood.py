"""How likely a model finds given tokens: their log-probabilities, and the likeliest tokens in their places.

Axes: B rows, T tokens of a row, N tokens of all rows, D hidden width, V vocabulary, k alternatives.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from r1pipe.model.logprobs import LOGITS_IN_MEMORY
from r1pipe.model.policy import Policy


class Likelihood(NamedTuple):
    """Of a row's tokens after its first, each given those before it."""

    logprobs_T: Tensor  # [T - 1], under softmax(logits), float32, on the CPU
    top_logprobs_Tk: Tensor  # [T - 1, k], of the likeliest tokens, falling
    top_tokens_Tk: Tensor


@torch.inference_mode()
def likelihoods(model: Policy, rows: Sequence[list[int]], top: int = 0) -> list[Likelihood]:
    """One forward pass over `rows`, of one token at least, padded on the right; `top`: k, the alternatives.

    Rows may be a token longer than the model reads. Logits are made for a part of the tokens at a time.
    """
    device, longest = model.lm_head.weight.device, max(2, *map(len, rows))
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    for row, tokens in enumerate(rows):
        tokens_BT[row, : len(tokens)] = torch.tensor(tokens, device=device)
    hidden_BTD = model.hidden(tokens_BT[:, :-1])
    return [
        _of_row(model, hidden_BTD[row, : len(tokens) - 1], tokens_BT[row, 1 : len(tokens)], top)
        for row, tokens in enumerate(rows)
    ]


def _of_row(model: Policy, hidden_ND: Tensor, targets_N: Tensor, top: int) -> Likelihood:
    parts = [_of_part(logits_NV, targets_N[first:], top) for first, logits_NV in _logits(model, hidden_ND)]
    if not parts:
        return Likelihood(torch.empty(0), torch.empty(0, top), torch.empty(0, top, dtype=torch.long))
    return Likelihood(*(torch.cat(of_all).cpu() for of_all in zip(*parts, strict=True)))


def _logits(model: Policy, hidden_ND: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(the first token's place, logits_NV) of a part of the tokens after the other."""
    chunk = max(1, LOGITS_IN_MEMORY // model.config.vocab_size)
    for first in range(0, len(hidden_ND), chunk):
        yield first, model.lm_head(hidden_ND[first : first + chunk])


def _of_part(logits_NV: Tensor, targets_N: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    targets_N1 = targets_N[: len(logprobs_NV)].unsqueeze(1)
    likeliest = logprobs_NV.topk(min(top, logprobs_NV.shape[1]), dim=-1)
    return logprobs_NV.gather(1, targets_N1).squeeze(1), likeliest.values, likeliest.indices
