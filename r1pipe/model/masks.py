"""Attention masks: as boolean tensors, and as block masks for FlexAttention.

FlexAttention skips blocks that are wholly masked, with one fused kernel for every mask; the fastest kernels
of scaled_dot_product_attention support only the causal one (Dong et al. 2024, arXiv 2412.05496).
Axes as in layers.py.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def document_positions(segments_BT: Tensor) -> Tensor:
    """The position of each token in its own document, [B, T] int64."""
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    first_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return places_T - torch.where(first_BT, places_T, 0).cummax(dim=1).values


def document_mask(segments_BT: Tensor) -> Tensor:
    """The keys that each token attends to, [B, T, T] bool: causal in its document; padding only itself."""
    tokens = segments_BT.shape[1]
    itself_TT = torch.eye(tokens, dtype=torch.bool, device=segments_BT.device)
    causal_TT = torch.ones_like(itself_TT).tril_()
    same_BTT = segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)
    return same_BTT & causal_TT & (segments_BT != 0).unsqueeze(2) | itself_TT


def past_mask(lengths_B: Tensor, past: int, tokens: int) -> Tensor:
    """The keys that each of `tokens` new tokens attends to, [B, T, P+T] bool: its past, then causal."""
    lengths_B11 = lengths_B[:, None, None]
    places_P = torch.arange(past, device=lengths_B.device)
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=lengths_B.device).tril_()
    shape = (len(lengths_B), tokens, -1)
    return torch.cat([(places_P < lengths_B11).expand(shape), causal_TT.expand(shape)], dim=2)


def causal_blocks(tokens: int, device: torch.device) -> BlockMask:
    """Causal, the same for all rows."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(sees, None, None, tokens, tokens, device=device)


def document_blocks(segments_BT: Tensor) -> BlockMask:
    """`document_mask` for FlexAttention."""
    rows, tokens = segments_BT.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = segments_BT[row, query]
        return (own == segments_BT[row, key]) & (own != 0) & (query > key) | (query == key)

    return create_block_mask(sees, rows, None, tokens, tokens, device=segments_BT.device)


def past_blocks(lengths_B: Tensor, past: int, tokens: int) -> BlockMask:
    """`past_mask` for FlexAttention."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < lengths_B[row]) | (key >= past) & (key - past <= query)

    return create_block_mask(sees, len(lengths_B), None, tokens, past + tokens, device=lengths_B.device)


def flex_attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scale: float) -> Tensor:
    """[B, T, H, width] on [B, M, H, width] -> [B, T, H, value width]."""
    # fused only when compiled; on a CPU it is a reference and runs uncompiled
    plain = query.device.type == "cpu" or torch.compiler.is_compiling()
    by_head = (each.transpose(1, 2) for each in (query, key, value))
    out = (flex_attention if plain else _compiled())(*by_head, block_mask=blocks, scale=scale)
    assert isinstance(out, Tensor)  # no auxiliary outputs were requested
    return out.transpose(1, 2)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
