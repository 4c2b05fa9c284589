"""Whether sampler and trainer route alike: an expert that one of them leaves out is a jump, not a rounding.

Axes: L MoE layers, B rows, T columns, K experts of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from r1pipe.config import RLConfig
from r1pipe.model import DeepseekV3
from r1pipe.model.cache import LatentCache
from r1pipe.model.native import decoder_of
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.batch import MicroBatch, Rollout, collate
from r1pipe.train.rl.update import balances_of, completion_logprobs


def routing_agreement(
    engine: Engine, rollouts: Sequence[Rollout], config: RLConfig, count: int
) -> dict[str, float]:
    """`train/routing_agreement`: share of the sampler's choices of experts that are the trainer's too.

    Over the completion tokens of `count` rollouts of each rank, with the weights of now; nothing where no
    expert was chosen. The sampler's choices are made again, by its decoder, token by token: as many passes as
    the longest has tokens, which all ranks wait for, so the shortest are compared.
    """
    told = sorted((one for one in rollouts if len(one.completion) > 1), key=lambda one: len(one.completion))
    with engine.gathered() as policy:
        same, chosen = _counted(policy, told[:count], config, engine.device)
    same, chosen = engine.sum_over_ranks([same, chosen])
    return {"train/routing_agreement": same / chosen} if chosen else {}


@torch.no_grad()
def _counted(
    policy: DeepseekV3, rows: list[Rollout], config: RLConfig, device: torch.device
) -> tuple[float, float]:
    """Choices that are the same, and all of them, in rows of two tokens or more: the first is not decoded."""
    if not rows or policy.config.first_k_dense_replace >= policy.config.num_hidden_layers:
        return 0.0, 0.0
    micro = collate(rows, [0.0] * len(rows), 0.0, device)
    balances = balances_of(micro, with_loss=False)
    completion_logprobs(policy, micro, config.sampling.temperature, balances)
    trained_LBTK = torch.stack(balances[1].experts).unflatten(1, micro.tokens_BT.shape)
    sampled_LBTK = _sampled(policy, rows, micro)
    # a row begins with the prompt's last token, which the sampler reads with the prompt
    read_BT = torch.arange(1, micro.tokens_BT.shape[1], device=device) < micro.lengths_B.unsqueeze(1)
    same_LBTK = (sampled_LBTK.unsqueeze(-1) == trained_LBTK[:, :, 1:].unsqueeze(-2)).any(dim=-1)
    found = same_LBTK[:, read_BT]
    return float(found.sum()), float(found.numel())


def _sampled(policy: DeepseekV3, rows: list[Rollout], micro: MicroBatch) -> Tensor:
    """What the sampler's decoder chooses for the tokens of the rows, but for their first."""
    decoder, device = decoder_of(policy), micro.tokens_BT.device
    longest, width = max(len(row.prompt) for row in rows), micro.tokens_BT.shape[1]
    padded = torch.tensor([row.prompt + [0] * (longest - len(row.prompt)) for row in rows], device=device)
    lengths_B = torch.tensor([len(row.prompt) for row in rows], device=device)
    cache, places_B = LatentCache(policy, len(rows), longest + width), torch.arange(len(rows), device=device)
    entries_LBTW, _ = decoder.prefill(padded, lengths_B)
    cache.fill(places_B, entries_LBTW, places_B)
    columns: list[Tensor] = []
    for column in range(1, width):
        with decoder.recorded() as experts:
            positions_B = lengths_B + column - 1
            tokens_B = micro.tokens_BT[:, column].contiguous()
            decoder.decode(tokens_B, positions_B, cache, longest + column)
        columns.append(torch.stack(experts))
    return torch.stack(columns, dim=2)
