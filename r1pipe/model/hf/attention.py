"""Attention of short rows on a CPU, written out.

The backward pass of torch's fused kernel takes three times as long in bfloat16 where a row has tens of
queries and keys, as completions of small problems do (64 rows of 30 queries on 110 keys: 91 ms a layer, 32
written out). Axes: B rows, H heads, h key-value heads, each of which serves H/h heads, T queries, M keys, d
width of a head. All is computed in float32, which takes no longer, and rounded once.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA_OR_SHORT = "sdpa_or_short"  # what transformers calls it
SHORT = 2**15  # queries times keys; at 288 x 288 both take the same time
OTHERS = ("position_bias", "softcap", "s_aux")  # parts of other architectures' attention


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query [B, H, T, d], key and value [B, h, M, d] -> [B, T, H, d].

    Rows that are long, that decode one token, or that have no boolean mask go to transformers' sdpa.
    """
    (B, H, T, d), (h, M) = query.shape, key.shape[1:3]
    short = T > 1 and T * M <= SHORT and query.dtype == torch.bfloat16 and query.device.type == "cpu"
    others = any(more.get(name) is not None for name in OTHERS)
    if not short or others or attention_mask is None or attention_mask.dtype != torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    scaled = query.float() * (scaling or d**-0.5)
    scores = scaled.reshape(B, h, H // h * T, d) @ key.float().transpose(2, 3)
    scores = scores.view(B, h, H // h, T, M).masked_fill(~attention_mask.unsqueeze(1), float("-inf"))
    mixed = torch.softmax(scores, dim=-1).view(B, h, H // h * T, M) @ value.float()
    return mixed.view(B, H, T, d).transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(SDPA_OR_SHORT, attend)
AttentionMaskInterface.register(SDPA_OR_SHORT, sdpa_mask)
