"""From scored groups to the padded micro-batches that an update reads.

Axes: P prompts, B rows and T columns of a micro-batch, N completion tokens of all its rows in sequence; L MoE
layers, K experts of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from r1pipe.config import RLConfig
from r1pipe.core.types import Completion, Group
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rl.advantages import is_scored
from r1pipe.train.rl.losses import LOSS_AGGREGATIONS


@dataclass
class Rollout:
    """One completion with its prompt and advantage: the unit of a minibatch.

    rollouts_of makes it from a Group; Reference.estimate_kl sets kl_T, Critic.estimate what PPO needs.
    """

    prompt: list[int]
    completion: Completion
    advantage: float
    scored: bool  # a completion whose reward failed has weight 0
    kl_T: Tensor | None = None  # KL estimate per token, where the KL is in the reward
    # PPO, per token:
    values: list[float] = field(default_factory=list)  # V before the token, from before any update
    advantages: list[float] = field(default_factory=list)  # in place of `advantage`; with a teacher, too
    returns: list[float] = field(default_factory=list)  # the targets of the values

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion.tokens)

    def kl(self) -> float:
        """The KL estimate of the whole completion: the sum over its tokens."""
        assert self.kl_T is not None
        return self.kl_T.sum().item()


@dataclass
class MicroBatch:
    """Prompts without their last token, each once, and the rows that continue them, padded on the right.

    A row is its prompt's last token and the completion without its last token: the hidden states at these
    positions predict the completion. Suffix N: completion tokens only; no logits are computed for padding.
    """

    prompts_PT: Tensor
    prompt_lengths_P: Tensor
    prompt_of_B: Tensor
    tokens_BT: Tensor
    sources_N: Tensor  # position in the flattened [B*T] whose hidden state predicts the token
    targets_N: Tensor
    old_N: Tensor  # the sampler's log-probabilities
    advantages_N: Tensor
    weights_N: Tensor
    lengths_B: Tensor  # of the rows, without padding
    balance_weight: float  # makes the micro-batches' balance losses a mean over all tokens read
    trainer_N: Tensor | None = None  # the trainer's log-probabilities before the update (stage.importance)
    reference_N: Tensor | None = None  # the reference model's log-probabilities (KL in the loss)
    values_N: Tensor | None = None  # PPO: the value model's, from before the update
    returns_N: Tensor | None = None
    experts_LNK: Tensor | None = None  # the sampler's choices for tokens_BT, flattened [B*T]; routing replay

    @property
    def positions(self) -> int:
        """Tokens that go through the model, with padding."""
        return self.prompts_PT.numel() + self.tokens_BT.numel()


def rollouts_of(groups: Sequence[Group]) -> list[Rollout]:
    """The completions that are trained on."""
    return [
        Rollout(
            *(group.prompt_tokens, group.completions[place], group.advantages[place]),
            scored=is_scored(group.rewards[place]),
        )
        for group in groups
        if group.trained
        for place in (range(len(group.completions)) if group.kept is None else group.kept)
    ]


def split_evenly(rollouts: Sequence[Rollout], parts: int) -> list[Sequence[Rollout]]:
    """`parts` minibatches of equal length; the config makes sure that they divide evenly."""
    size = len(rollouts) // parts
    return [rollouts[i * size : (i + 1) * size] for i in range(parts)]


def padded_tokens(rollouts: Sequence[Rollout]) -> int:
    """In a micro-batch: prompts once, and the completions, with padding."""
    prompts = {tuple(rollout.prompt) for rollout in rollouts}
    longest = max(len(rollout.completion.tokens) for rollout in rollouts)
    return len(prompts) * max(map(len, prompts)) + len(rollouts) * longest


def by_prompt(rollouts: Sequence[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """Rollouts in micro-batches of whole groups, at most `max_tokens` each with padding.

    The groups with the longest completions come first: running out of memory shows at once. A group that is
    too large is split, and a rollout longer than `max_tokens` gets a micro-batch of its own.
    """
    groups: dict[tuple[int, ...], list[Rollout]] = {}
    for rollout in sorted(rollouts, key=lambda rollout: len(rollout.completion.tokens), reverse=True):
        groups.setdefault(tuple(rollout.prompt), []).append(rollout)
    batches: list[list[Rollout]] = []
    for group in groups.values():
        if batches and padded_tokens(batches[-1] + group) <= max_tokens:
            batches[-1] += group
            continue
        batches.append(group[:1])
        for rollout in group[1:]:
            if padded_tokens([*batches[-1], rollout]) <= max_tokens:
                batches[-1].append(rollout)
            else:
                batches.append([rollout])
    return batches


def micro_batches(
    ranks: Ranks, minibatch: Sequence[Rollout], config: RLConfig, aggregation: str
) -> list[MicroBatch]:
    """This rank's share of a minibatch, weighted so that the ranks' average is the loss's mean; all ranks
    call. `aggregation` is a key of LOSS_AGGREGATIONS."""
    # tokens of a forward pass without padding: prompts once, though their groups may be split over
    # micro-batches, and every token but each sequence's last
    prompts = {tuple(rollout.prompt) for rollout in minibatch}
    inputs = sum(len(prompt) - 1 for prompt in prompts) + sum(len(r.completion.tokens) for r in minibatch)
    sequences, tokens, read = ranks.sum_over_ranks([*scored_counts(minibatch), float(inputs)])
    sequences, tokens = sequences / ranks.world_size, tokens / ranks.world_size
    longest = config.sampling.max_tokens
    return [
        collate(
            rollouts,
            weights_of(rollouts, aggregation, sequences, tokens, longest),
            ranks.world_size / read,
            ranks.device,
        )
        for rollouts in by_prompt(minibatch, config.max_tokens_per_micro_batch)
    ]


def scored_counts(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """How many completions, and how many of their tokens, a loss over these rollouts averages."""
    lengths = [len(rollout.completion.tokens) for rollout in rollouts if rollout.scored]
    return float(len(lengths)), float(sum(lengths))


def weights_of(
    rollouts: Sequence[Rollout], aggregation: str, sequences: float, tokens: float, longest: int
) -> list[float]:
    """Weight of each rollout's tokens in the loss (see LOSS_AGGREGATIONS); 0 where a reward failed."""
    weight = LOSS_AGGREGATIONS[aggregation]
    return [
        weight(len(r.completion.tokens), sequences, tokens, longest) if r.scored else 0.0 for r in rollouts
    ]


def collate(
    rollouts: Sequence[Rollout], weights: Sequence[float] | None, balance_weight: float, device: torch.device
) -> MicroBatch:
    """Rollouts as tensors. `weights` are those of each rollout's tokens in the loss; None without a loss."""
    completions = [rollout.completion for rollout in rollouts]
    prompts = list(dict.fromkeys(tuple(rollout.prompt) for rollout in rollouts))
    prompt_lengths = [len(prompt) - 1 for prompt in prompts]
    index = {prompt: p for p, prompt in enumerate(prompts)}
    lengths = [len(completion.tokens) for completion in completions]
    width = max(lengths)
    rows = [[rollout.prompt[-1], *rollout.completion.tokens[:-1]] for rollout in rollouts]
    lengths_B = torch.tensor(lengths)

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths_B).to(device)

    def joined(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([value for row in values for value in row], dtype=torch.float32).to(device)

    micro = MicroBatch(
        # at least one column; a prompt of one token reads nothing in it
        prompts_PT=_padded([prompt[:-1] for prompt in prompts], max(1, *prompt_lengths)).to(device),
        prompt_lengths_P=torch.tensor(prompt_lengths).to(device),
        prompt_of_B=torch.tensor([index[tuple(rollout.prompt)] for rollout in rollouts]).to(device),
        tokens_BT=_padded(rows, width).to(device),
        sources_N=torch.cat([torch.arange(n) + row * width for row, n in enumerate(lengths)]).to(device),
        targets_N=torch.tensor([token for c in completions for token in c.tokens]).to(device),
        old_N=joined([completion.logprobs for completion in completions]),
        advantages_N=per_token([rollout.advantage for rollout in rollouts]),
        weights_N=per_token(weights or [0.0] * len(rollouts)),
        lengths_B=lengths_B.to(device),
        balance_weight=balance_weight,
    )
    if all(completion.experts is not None for completion in completions):
        micro.experts_LNK = _experts(completions, width).to(device)
    if rollouts[0].advantages:  # then all have them
        micro.advantages_N = joined([rollout.advantages for rollout in rollouts])
    if rollouts[0].values:
        micro.values_N = joined([rollout.values for rollout in rollouts])
        micro.returns_N = joined([rollout.returns for rollout in rollouts])
    return micro


def _experts(completions: Sequence[Completion], width: int) -> Tensor:
    """The sampler's experts for rows padded to `width`, [L, B*T, K]; padding has the first K, uncounted."""
    recorded = [completion.experts for completion in completions if completion.experts is not None]
    _, layers, top_k = recorded[0].shape
    padded_BTLK = np.tile(np.arange(top_k), (len(recorded), width, layers, 1))
    for row_TLK, of_row in zip(padded_BTLK, recorded, strict=True):
        row_TLK[: len(of_row)] = of_row
    return torch.from_numpy(padded_BTLK).permute(2, 0, 1, 3).flatten(1, 2).contiguous()


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Padded on the right, with zeros that no attention sees and no gate counts."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
