"""FlexAttention for whole rows: masks as rules, so that blocks of keys which nobody may look at are skipped.

One fused kernel for every mask, where scaled_dot_product_attention's fastest ones know none but the causal
(Dong et al. 2024, arXiv 2412.05496). Axes as in layers.py.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def causal_blocks(tokens: int, device: torch.device) -> BlockMask:
    """Each token sees itself and those before it; the same for all rows."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(sees, None, None, tokens, tokens, device=device)


def document_blocks(segments_BT: Tensor) -> BlockMask:
    """What transformer.document_mask allows: causal, of one document; padding sees itself."""
    rows, tokens = segments_BT.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = segments_BT[row, query]
        return (own == segments_BT[row, key]) & (own != 0) & (query > key) | (query == key)

    return create_block_mask(sees, rows, None, tokens, tokens, device=segments_BT.device)


def past_blocks(lengths_B: Tensor, past: int, tokens: int) -> BlockMask:
    """What transformer.past_mask allows: keys are `past` places, filled up on the right, then the row's."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < lengths_B[row]) | (key >= past) & (key - past <= query)

    return create_block_mask(sees, len(lengths_B), None, tokens, past + tokens, device=lengths_B.device)


def flex_attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scale: float) -> Tensor:
    """[B, T, H, width] on [B, M, H, width] -> [B, T, H, value width]."""
    # fused only where compiled; a CPU, where this serves as a reference, takes it as it is
    plain = query.device.type == "cpu" or torch.compiler.is_compiling()
    by_head = (each.transpose(1, 2) for each in (query, key, value))
    out = (flex_attention if plain else _compiled())(*by_head, block_mask=blocks, scale=scale)
    assert isinstance(out, Tensor)  # no auxiliary outputs were asked for
    return out.transpose(1, 2)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
