"""Whether sampler and trainer choose the same experts: another choice is a jump, not a rounding error.

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


@torch.no_grad()
def routing_agreement(
    engine: Engine, rollouts: Sequence[Rollout], config: RLConfig, count: int
) -> dict[str, float]:
    """`train/routing_agreement`: the share of the sampler's choices of experts that the trainer makes too.

    Over the completion tokens of `count` rollouts of each rank, under the current weights; empty where no
    expert was chosen. The sampler's decoder chooses again, token by token: one pass per token of the longest
    completion, which all ranks wait for, so the shortest are compared.
    """
    rows = [rollout for rollout in rollouts if len(rollout.completion.tokens) > 1]  # the first is not decoded
    rows = sorted(rows, key=lambda rollout: len(rollout.completion.tokens))[:count]
    choices = torch.zeros(0)
    with engine.gathered() as policy:
        if rows and policy.config.first_k_dense_replace < policy.config.num_hidden_layers:
            micro = collate(rows, None, 0.0, engine.device)
            balances = balances_of(micro, with_loss=False)
            completion_logprobs(policy, micro, config.sampling.temperature, balances)
            trained_LBTK = torch.stack(balances[1].experts).unflatten(1, micro.tokens_BT.shape)
            sampled_LBTK = _decoder_choices(policy, rows, micro)
            # a row starts with the prompt's last token, which the sampler reads with the prompt
            columns = torch.arange(1, micro.tokens_BT.shape[1], device=engine.device)
            read_BT = columns < micro.lengths_B.unsqueeze(1)
            same_LBTK = (sampled_LBTK.unsqueeze(-1) == trained_LBTK[:, :, 1:].unsqueeze(-2)).any(dim=-1)
            choices = same_LBTK[:, read_BT]
    same, chosen = engine.sum_over_ranks([float(choices.sum()), float(choices.numel())])
    return {"train/routing_agreement": same / chosen} if chosen else {}


def _decoder_choices(policy: DeepseekV3, rows: list[Rollout], micro: MicroBatch) -> Tensor:
    """experts_LBTK that the sampler's decoder chooses for the rows' tokens after the first."""
    decoder, device = decoder_of(policy), micro.tokens_BT.device
    longest, width = max(len(row.prompt) for row in rows), micro.tokens_BT.shape[1]
    padded = torch.tensor([row.prompt + [0] * (longest - len(row.prompt)) for row in rows], device=device)
    lengths_B = torch.tensor([len(row.prompt) for row in rows], device=device)
    cache, slots_B = LatentCache(policy, len(rows), longest + width), torch.arange(len(rows), device=device)
    entries_LBTW, _ = decoder.prefill(padded, lengths_B)
    cache.fill(slots_B, entries_LBTW, slots_B)
    columns: list[Tensor] = []
    for column in range(1, width):
        with decoder.recorded() as experts:
            positions_B = lengths_B + column - 1
            tokens_B = micro.tokens_BT[:, column].contiguous()
            decoder.decode(tokens_B, positions_B, cache, longest + column)
        columns.append(torch.stack(experts))
    return torch.stack(columns, dim=2)
