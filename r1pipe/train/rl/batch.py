"""From scored groups to padded micro-batches: what an update reads.

Axes: P prompts, B rows and T columns of a micro-batch, N completion tokens of all its rows in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1pipe.core.types import Group
from r1pipe.train.rl.advantages import is_scored
from r1pipe.train.rl.losses import LOSS_MEANS


@dataclass
class Estimate:
    """What a value model makes of one completion, a number for each of its tokens (PPO)."""

    values: list[float]  # V of what was read before the token, before any update
    advantages: list[float]
    returns: list[float]  # what the values are to become


@dataclass
class Rollout:
    """One completion with its prompt and what it earned: the unit that updates are made of."""

    prompt: list[int]
    completion: list[int]
    old: list[float]  # log-probability of each completion token when it was drawn
    advantage: float
    scored: bool  # a completion whose reward failed weighs nothing
    estimate: Estimate | None = None  # PPO: its advantages stand in the place of `advantage`

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass
class MicroBatch:
    """Prompts but for their last token, each once, and rows that go on from them.

    A row is its prompt's last token and the completion but for the completion's own last token: the hidden
    states at its places predict the completion. Prompts and rows are filled up on the right; what has suffix
    N is of completion tokens alone, so that no logits are computed for filling.
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
    lengths_B: Tensor  # of the rows, without what fills them up
    balance_weight: float  # factor that makes the micro-batches' balance losses a mean over all tokens read
    trainer_N: Tensor | None = None  # the trainer's own of `old_N`, where importance sampling is asked for
    reference_N: Tensor | None = None  # log-probabilities under the reference model, where a KL is asked for
    values_N: Tensor | None = None  # PPO: the value model's, from before the update
    returns_N: Tensor | None = None


def rollouts_of(groups: Sequence[Group], prompts: Sequence[list[int]]) -> list[Rollout]:
    """Every completion of the groups that are trained on; `prompts` are the groups' prompts as token ids."""
    return [
        Rollout(prompt, completion.tokens, completion.logprobs, advantage, is_scored(reward))
        for group, prompt in zip(groups, prompts, strict=True)
        if group.trained
        for completion, reward, advantage in zip(
            group.completions, group.rewards, group.advantages, strict=True
        )
    ]


def split_evenly(rollouts: Sequence[Rollout], parts: int) -> list[Sequence[Rollout]]:
    """`parts` minibatches of equal length (a multiple of `parts` is asked of the config)."""
    size = len(rollouts) // parts
    return [rollouts[i * size : (i + 1) * size] for i in range(parts)]


def padded_tokens(rollouts: Sequence[Rollout]) -> int:
    """What a micro-batch of these rollouts computes: its prompts once, and the completions."""
    prompts = {tuple(rollout.prompt) for rollout in rollouts}
    longest = max(len(rollout.completion) for rollout in rollouts)
    return len(prompts) * max(map(len, prompts)) + len(rollouts) * longest


def by_prompt(rollouts: Sequence[Rollout], max_tokens_per_micro_batch: int) -> list[list[Rollout]]:
    """Micro-batches of whole groups that pad to no more than `max_tokens_per_micro_batch` tokens.

    Completions of one prompt are much alike in length, and groups are sorted by their longest, so little is
    padded. The longest come first: if memory is short, it shows at once. A group that is too large alone is
    cut, and a rollout longer than `max_tokens_per_micro_batch` gets a micro-batch of its own.
    """
    groups: dict[tuple[int, ...], list[Rollout]] = {}
    for rollout in sorted(rollouts, key=lambda rollout: len(rollout.completion), reverse=True):
        groups.setdefault(tuple(rollout.prompt), []).append(rollout)
    batches: list[list[Rollout]] = []
    for group in groups.values():
        if batches and padded_tokens(batches[-1] + group) <= max_tokens_per_micro_batch:
            batches[-1] += group
            continue
        batches.append(group[:1])
        for rollout in group[1:]:
            if padded_tokens([*batches[-1], rollout]) <= max_tokens_per_micro_batch:
                batches[-1].append(rollout)
            else:
                batches.append([rollout])
    return batches


def _filled(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Rows filled up on the right to `width` tokens, with zeros that no attention sees and no gate counts."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def tokens_read(rollouts: Sequence[Rollout]) -> float:
    """Tokens that a pass over the rollouts reads, without filling: prompts once, all but each last token.

    Where a group is cut into several micro-batches its prompt is read more often than it is counted here.
    """
    prompts = {tuple(rollout.prompt) for rollout in rollouts}
    return float(sum(len(prompt) - 1 for prompt in prompts) + sum(len(r.completion) for r in rollouts))


def collate(
    rollouts: Sequence[Rollout], weights: Sequence[float], balance_weight: float, device: torch.device
) -> MicroBatch:
    """Rollouts as tensors. `weights` are those of each rollout's tokens in the loss."""
    prompts = list(dict.fromkeys(tuple(rollout.prompt) for rollout in rollouts))
    prompt_lengths = [len(prompt) - 1 for prompt in prompts]
    place = {prompt: p for p, prompt in enumerate(prompts)}
    lengths = [len(rollout.completion) for rollout in rollouts]
    width = max(lengths)
    rows = [[rollout.prompt[-1], *rollout.completion[:-1]] for rollout in rollouts]
    lengths_S = torch.tensor(lengths)

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths_S).to(device)

    micro = MicroBatch(
        # one token at least, of which a prompt of one token sees nothing
        prompts_PT=_filled([prompt[:-1] for prompt in prompts], max(1, *prompt_lengths)).to(device),
        prompt_lengths_P=torch.tensor(prompt_lengths).to(device),
        prompt_of_B=torch.tensor([place[tuple(rollout.prompt)] for rollout in rollouts]).to(device),
        tokens_BT=_filled(rows, width).to(device),
        sources_N=torch.cat([torch.arange(n) + row * width for row, n in enumerate(lengths)]).to(device),
        targets_N=torch.tensor([token for rollout in rollouts for token in rollout.completion]).to(device),
        old_N=torch.tensor([logprob for rollout in rollouts for logprob in rollout.old]).to(device),
        advantages_N=per_token([rollout.advantage for rollout in rollouts]),
        weights_N=per_token(weights),
        lengths_B=lengths_S.to(device),
        balance_weight=balance_weight,
    )
    estimates = [rollout.estimate for rollout in rollouts if rollout.estimate]
    if estimates:  # of all or of none
        micro.advantages_N = _joined([estimate.advantages for estimate in estimates]).to(device)
        micro.values_N = _joined([estimate.values for estimate in estimates]).to(device)
        micro.returns_N = _joined([estimate.returns for estimate in estimates]).to(device)
    return micro


def _joined(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float32)


def scored_counts(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """How many completions, and how many of their tokens, a loss over these rollouts is the mean of."""
    lengths = [len(rollout.completion) for rollout in rollouts if rollout.scored]
    return float(len(lengths)), float(sum(lengths))


def weights_of(
    rollouts: Sequence[Rollout], loss_aggregation: str, sequences: float, tokens: float, longest: int
) -> list[float]:
    """What each rollout's tokens weigh in the loss (see LOSS_MEANS); 0 where a reward failed."""
    weight = LOSS_MEANS[loss_aggregation]
    return [weight(len(r.completion), sequences, tokens, longest) if r.scored else 0.0 for r in rollouts]
