"""A local teacher reads responses: forward passes alone, in shards.

Axes: B rows, T tokens, N learned tokens of a micro-batch, D hidden width, V vocabulary, K top tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from r1pipe.core.types import Example
from r1pipe.data.packing import Packed, collate
from r1pipe.model import Policy
from r1pipe.model.logprobs import LOGITS_IN_MEMORY, Head
from r1pipe.runs import heartbeat, stopping
from r1pipe.train.answering import LocalAnswerer
from r1pipe.train.sft.loop import read

ROW_TOKENS = 4096  # padded tokens of a forward pass

# From the head, hidden_ND before each learned token, and those tokens_N: tensors with N rows.
Measure = Callable[[Head, Tensor, Tensor], tuple[Tensor, ...]]


def read_examples(
    teacher: LocalAnswerer, examples: Sequence[Example], measure: Measure
) -> list[tuple[np.ndarray, ...] | None]:
    """What `measure` gives for the learned tokens of each example; None where it is longer than the teacher's
    context. Where weights are sharded all ranks call. Raises Stopped on a request to stop."""
    found: list[tuple[np.ndarray, ...] | None] = [None] * len(examples)
    with teacher.reading() as model:
        longest = model.config.max_position_embeddings
        fit = [i for i, example in enumerate(examples) if len(example.tokens) <= longest]
        for places in _batches(fit, examples):
            if stopping.requested():
                raise stopping.Stopped
            heartbeat.tick()
            parts = _measured(model, [examples[i] for i in places], teacher.chat.pad_id, measure)
            for i, part in zip(places, parts, strict=True):
                found[i] = part
    return found


def _batches(fit: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
    """Places of examples that are read together, of like length."""
    batch: list[int] = []
    for i in sorted(fit, key=lambda i: (len(examples[i].tokens), i)):
        if batch and len(examples[i].tokens) * (len(batch) + 1) > ROW_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _measured(
    model: Policy, examples: Sequence[Example], pad_id: int, measure: Measure
) -> list[tuple[np.ndarray, ...]]:
    rows = []
    for example in examples:
        rows.append(Packed())
        rows[-1].add(example)
    batch = collate(rows, pad_id).to(model.lm_head.weight.device)
    hidden_BTD, _ = read(model, batch, with_balance=False)
    learned_BT = batch.loss_BT[:, 1:]
    values = measure(model.lm_head, hidden_BTD[:, :-1][learned_BT], batch.tokens_BT[:, 1:][learned_BT])
    counts = learned_BT.sum(1).tolist()
    by_row = [value.cpu().split(counts) for value in values]
    return [tuple(part.numpy() for part in parts) for parts in zip(*by_row, strict=True)]


def top_k(k: int) -> Measure:
    """ids_NK, log-probabilities_NK, and log of what they leave over_N, a few tokens at a time."""

    def measure(head: Head, hidden_ND: Tensor, tokens_N: Tensor) -> tuple[Tensor, ...]:
        chunk = max(1, LOGITS_IN_MEMORY // head.out_features)
        parts = [_top(head(part_cD).float(), k) for part_cD in hidden_ND.split(chunk)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    return measure


def _top(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_NV = logits_NV.log_softmax(-1)
    top = logprobs_NV.topk(min(k, logprobs_NV.shape[1]))
    rest_N = logprobs_NV.scatter(1, top.indices, -torch.inf).logsumexp(-1)
    return top.indices.int(), top.values, rest_N


def likelihoods(head: Head, hidden_ND: Tensor, tokens_N: Tensor) -> tuple[Tensor, ...]:
    """A Measure: log-probabilities_N of the tokens themselves."""
    return (head(hidden_ND, tokens_N),)
