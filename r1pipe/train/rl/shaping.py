"""The KL as a part of a completion's reward, and which groups are worth learning from."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from r1pipe.config import RLConfig
from r1pipe.core.types import Completion, Group
from r1pipe.rewards import SHAPING_REWARDS
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rl.advantages import has_variance
from r1pipe.train.rl.batch import Rollout, by_prompt, collate
from r1pipe.train.rl.losses import KL_ESTIMATORS
from r1pipe.train.rl.scoring import KL, total_reward
from r1pipe.train.rl.update import Reference


def kl_of_completions(
    reference: Reference,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    config: RLConfig,
    device: torch.device,
) -> list[float]:
    """The KL estimate of each completion, the sum over its tokens: a group compares whole completions."""
    return [kl_N.sum().item() for kl_N in kl_of_tokens(reference, prompts, completions, config, device)]


def kl_of_tokens(
    reference: Reference,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    config: RLConfig,
    device: torch.device,
) -> list[Tensor]:
    """The KL estimate of every token of each completion; `completions` are G in a row for a prompt.

    A KL in the reward is per token (InstructGPT, arXiv 2203.02155, eq. 2; DeepSeekMath eq. 2), here at the
    sampler's log-probabilities.
    """
    size = len(completions) // len(prompts)
    rollouts = [
        Rollout(prompts[i // size], completion.tokens, completion.logprobs, 0.0, True)
        for i, completion in enumerate(completions)
    ]
    found: dict[int, Tensor] = {}
    for rows in by_prompt(rollouts, config.max_tokens_per_micro_batch):
        micro = collate(rows, [0.0] * len(rows), 0.0, device)
        reference_N = reference.logprobs(micro, config.sampling.temperature)
        kl_N = KL_ESTIMATORS[config.kl_estimator](micro.old_N, reference_N)
        for row, tokens in zip(rows, kl_N.split([len(row.completion) for row in rows]), strict=True):
            found[id(row)] = tokens
    return [found[id(rollout)] for rollout in rollouts]


def has_signal(group: Group, weights: Mapping[str, float]) -> bool:
    """Whether what judges the answers tells the group's completions apart.

    DAPO (eq. 11) asks for right and wrong answers; here every weighted verdict counts. What shapes the reward
    by length or KL does not: it differs in every group.
    """
    verdicts = {name: weight for name, weight in weights.items() if name not in (KL, *SHAPING_REWARDS)}
    return has_variance([total_reward(scores, verdicts, 0.0, False) for scores in group.scores])


def redistribute_groups(
    ranks: Ranks,
    tokens: Sequence[list[int]],
    groups: Sequence[Group],
    weights: Mapping[str, float],
    wanted: int,
) -> tuple[list[list[int]], list[Group]]:
    """Chooses `wanted` of all ranks' groups to be trained on: the first that teach and, if these are too few,
    the first others. -> prompts and groups: this rank's share of them, and what it has itself passed over.
    """
    marks = [(not has_signal(group, weights), group.place) for group in groups]
    order = sorted(mark for theirs in ranks.all_gather_objects(marks) for mark in theirs)
    chosen = {place: number for number, (_, place) in enumerate(order[:wanted])}
    for group in groups:
        group.trained = group.place in chosen
    drawn = [*zip(tokens, groups, strict=True)]
    sent = [pair for pair in drawn if pair[1].trained]
    left = [pair for pair in drawn if not pair[1].trained]
    learned = [pair for theirs in ranks.all_gather_objects(sent) for pair in theirs]
    learned.sort(key=lambda pair: chosen[pair[1].place])
    mine = learned[ranks.rank :: ranks.world_size] + left
    return [prompt for prompt, _ in mine], [group for _, group in mine]
