"""From scored groups to padded micro-batches: what an update reads.

Axes: B rows and T columns of a micro-batch, N completion tokens of all its rows in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from r1pipe.records import Group
from r1pipe.rl.advantages import is_scored
from r1pipe.rl.losses import LOSS_MEANS


@dataclass
class Rollout:
    """One completion with its prompt and what it earned: the unit that updates are made of."""

    prompt: list[int]
    completion: list[int]
    old: list[float]  # log-probability of each completion token when it was drawn
    advantage: float
    scored: bool  # a completion whose reward failed weighs nothing

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass
class MicroBatch:
    """Rows filled up on the right. What has suffix N is of completion tokens alone, so that no logits are
    computed for prompts and filling."""

    tokens_BT: Tensor
    sources_N: Tensor  # position in the flattened [B*T] whose hidden state predicts the token
    targets_N: Tensor
    old_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    reference_N: Tensor | None = None  # log-probabilities under the reference model, where a KL is asked for


def rollouts_of(groups: Sequence[Group], prompts: Sequence[list[int]]) -> list[Rollout]:
    """Every completion of the groups; `prompts` are their prompts as token ids."""
    return [
        Rollout(prompt, completion.tokens, completion.logprobs, advantage, is_scored(reward))
        for group, prompt in zip(groups, prompts, strict=True)
        for completion, reward, advantage in zip(
            group.completions, group.rewards, group.advantages, strict=True
        )
    ]


def split_evenly(rollouts: Sequence[Rollout], parts: int) -> list[Sequence[Rollout]]:
    """`parts` minibatches of equal length (a multiple of `parts` is asked of the config)."""
    size = len(rollouts) // parts
    return [rollouts[i * size : (i + 1) * size] for i in range(parts)]


def by_length(rollouts: Sequence[Rollout], micro_tokens: int) -> list[list[Rollout]]:
    """Sorted by length and cut so that no micro-batch pads to more than `micro_tokens` tokens.

    Neighbours in length share a micro-batch, so little is padded. The longest come first: if memory is short,
    it shows at once. A rollout longer than `micro_tokens` gets a micro-batch of its own.
    """
    batches: list[list[Rollout]] = []
    for rollout in sorted(rollouts, key=len, reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= micro_tokens:
            batches[-1].append(rollout)
        else:
            batches.append([rollout])
    return batches


def collate(rollouts: Sequence[Rollout], weights: Sequence[float], device: torch.device) -> MicroBatch:
    """Fill each row on the right up to the longest. `weights` are those of each rollout's tokens in the loss.

    Causal attention never looks right, so the filling changes nothing. It repeats the row's own tokens: the
    experts are balanced on what passes the gates, and a run of pad tokens would all go to the same ones.
    """
    width = max(len(rollout) for rollout in rollouts)
    tokens_BT = torch.tensor([list(islice(cycle(r.prompt + r.completion), width)) for r in rollouts])
    # the prompt's last token predicts the completion's first
    starts = [row * width + len(rollout.prompt) - 1 for row, rollout in enumerate(rollouts)]
    lengths = [len(rollout.completion) for rollout in rollouts]
    sources_N = torch.cat(
        [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    )
    lengths_S = torch.tensor(lengths)

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths_S).to(device)

    return MicroBatch(
        tokens_BT=tokens_BT.to(device),
        sources_N=sources_N.to(device),
        targets_N=tokens_BT.flatten()[sources_N + 1].to(device),
        old_N=torch.tensor([logprob for rollout in rollouts for logprob in rollout.old]).to(device),
        advantages_N=per_token([rollout.advantage for rollout in rollouts]),
        weights_N=per_token(weights),
    )


def scored_counts(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """How many completions, and how many of their tokens, a loss over these rollouts is the mean of."""
    lengths = [len(rollout.completion) for rollout in rollouts if rollout.scored]
    return float(len(lengths)), float(sum(lengths))


def weights_of(rollouts: Sequence[Rollout], loss_mean: str, sequences: float, tokens: float) -> list[float]:
    """What each rollout's tokens weigh in the loss (see LOSS_MEANS); 0 where a reward failed."""
    weight = LOSS_MEANS[loss_mean]
    return [weight(len(r.completion), sequences, tokens) if r.scored else 0.0 for r in rollouts]
