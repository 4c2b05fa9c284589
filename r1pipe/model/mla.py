"""Multi-head latent attention with decoupled rotary positions (V2 section 2.1; V3 section 2.1.1), and masks.

FlexAttention skips blocks that are wholly masked, with one fused kernel for every mask; the fastest kernels
of scaled_dot_product_attention support only the causal one (Dong et al. 2024, arXiv 2412.05496).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from r1pipe.config import ModelConfig
from r1pipe.model.kernels import training as kernels
from r1pipe.model.layers import Linear, RMSNorm, rotate, softmax_scale

# Takes a layer's cache entries. A function, not a list: ZeRO-3 passes modules a copy of a list.
Keep = Callable[[Tensor], None]


@dataclass(frozen=True)
class Ordered:
    """A mask for keys in another order than past and row, joined, have."""

    order_BM: Tensor  # their indices (int64)
    seen_BTM: Tensor  # the mask in that order


# The keys that each token may attend to: [B, T, M] bool, or FlexAttention's blocks; None: causal.
Mask = Tensor | BlockMask | Ordered | None

LATENT_EPS = 1e-6  # of the latent norms, whatever rms_norm_eps is, as in the published models


class MLA(nn.Module, kernels.Invariant):
    """Keys and values come from one latent per token, positions from a rotary key that all heads share."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        query_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, query_width)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query_width)
        self.kv_a_proj_with_mqa = Linear(width, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, width)
        self.scale = softmax_scale(config)

    def queries(self, x: Tensor) -> Tensor:
        """x [..., D] -> queries [..., H, nope+R], not yet rotated."""
        config = self.config
        if config.q_lora_rank is None:
            query = self.q_proj(x)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return query.unflatten(-1, (config.num_attention_heads, -1))

    def _rotated(self, query: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """queries [..., H, nope+R], rotation [..., r] -> [..., H, nope] and rotated [..., H, R]."""
        config = self.config
        nope, rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return nope, rotate(rope, rotation.unsqueeze(-2))

    def latents(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """A token's cache entry: the normed latent [..., C] and the rotated key [..., R]."""
        latent, rope = self.kv_a_proj_with_mqa(x).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        return self.kv_a_layernorm(latent), rotate(rope, rotation, self.batch_invariant)

    def _entries(self, latent: Tensor, k_rope: Tensor) -> Tensor:
        """Cache entries [..., C+R]. In FP8, decoding reads latents rounded as for `kv_b_proj`."""
        fp8 = self.kv_b_proj.fp8
        if fp8 is not None and not torch.is_grad_enabled():
            latent = fp8.rounded(latent)
        return torch.cat([latent, k_rope], dim=-1)

    def forward(
        self,
        x_BTD: Tensor,
        rotation_BTr: Tensor,
        mask_BTM: Mask,
        keep: Keep | None = None,
        past_BPW: Tensor | None = None,
    ) -> Tensor:
        """Attention over whole rows: causal, or where `mask_BTM` is true.

        `keep` is called with this layer's cache entries, latent then rotated key, [B, T, C+R]. `past_BPW` has
        the entries of P tokens before the row: the keys are M = P + T.
        """
        config = self.config
        query = self.queries(x_BTD)
        latent, k_rope = self.latents(x_BTD, rotation_BTr)
        if keep is not None:
            keep(self._entries(latent, k_rope))
        if past_BPW is not None:
            past_latent, past_rope = past_BPW.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
            latent, k_rope = torch.cat([past_latent, latent], dim=1), torch.cat([past_rope, k_rope], dim=1)
        if isinstance(mask_BTM, Ordered):
            latent, k_rope = _taken(latent, mask_BTM.order_BM), _taken(k_rope, mask_BTM.order_BM)
            mask_BTM = mask_BTM.seen_BTM
        key_value = self.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
        widths = config.qk_nope_head_dim, config.v_head_dim
        if not isinstance(mask_BTM, BlockMask) and self.usable(query, *widths):
            out = kernels.attention(query, key_value, k_rope, rotation_BTr, mask_BTM, self.scale)
        else:
            k_nope, value = key_value.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
            shared = k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)
            out = _attend(
                torch.cat(self._rotated(query, rotation_BTr), dim=-1),
                torch.cat([k_nope, shared], dim=-1),
                value,
                mask_BTM,
                self.scale,
            )
        return self.o_proj(out.flatten(-2))

    def decode(
        self, x_SD: Tensor, rotation_Sr: Tensor, places_S: Tensor, entries_SMW: Tensor, unseen_SM: Tensor
    ) -> Tensor:
        """One token per slot on the cache, absorbed: keys and values are never expanded (V2 section 2.1.2).

        q' = q_nope W_UK; scores = q' . latent + q_rope . k_rope; out = (attention . latent) W_UV. The
        token's own entry is written at `places_S` of the flattened [S*M]; `unseen_SM` is -inf at masked
        places.
        """
        config = self.config
        own_SW = self._entries(*self.latents(x_SD, rotation_Sr))
        entries_SMW.flatten(0, 1).index_copy_(0, places_S, own_SW)
        seen_SMW = entries_SMW[:, : unseen_SM.shape[1]]

        up_k, up_v = (
            self.kv_b_proj.rounded_weight()
            .unflatten(0, (config.num_attention_heads, -1))
            .split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        )
        q_nope, q_rope = self._rotated(self.queries(x_SD), rotation_Sr)
        absorbed = torch.bmm(q_nope.transpose(0, 1), up_k).transpose(0, 1)
        query_SHW = torch.cat([absorbed, q_rope], dim=-1)
        # one head with H queries, and keys that are also the values: a single pass over the cache
        context_SHW = F.scaled_dot_product_attention(
            query_SHW.unsqueeze(1),
            seen_SMW.unsqueeze(1),
            seen_SMW.unsqueeze(1),
            attn_mask=unseen_SM[:, None, None],
            scale=self.scale,
        ).squeeze(1)
        context_SHC = context_SHW[..., : config.kv_lora_rank]
        out_HSv = torch.bmm(context_SHC.transpose(0, 1), up_v.transpose(1, 2))
        return self.o_proj(out_HSv.transpose(0, 1).flatten(1))


def _taken(x_BMC: Tensor, order_BM: Tensor) -> Tensor:
    return x_BMC.gather(1, order_BM.unsqueeze(2).expand(-1, -1, x_BMC.shape[2]))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask_BTM: Tensor | BlockMask | None, scale: float
) -> Tensor:
    """[B, T, H, width] on [B, M, H, width] -> [B, T, H, value width]."""
    if isinstance(mask_BTM, BlockMask):
        # fused only when compiled; on a CPU it is a reference and runs uncompiled
        plain = query.device.type == "cpu" or torch.compiler.is_compiling()
        by_head = (each.transpose(1, 2) for each in (query, key, value))
        out = (flex_attention if plain else _compiled())(*by_head, block_mask=mask_BTM, scale=scale)
        assert isinstance(out, Tensor)  # no auxiliary outputs were requested
        return out.transpose(1, 2)
    width = value.shape[-1]
    if query.shape[-1] > width:  # the fused kernels need one width for all three
        value = F.pad(value, (0, query.shape[-1] - width))
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if mask_BTM is None else mask_BTM.unsqueeze(1),
        is_causal=mask_BTM is None,
        scale=scale,
    )
    return out.transpose(1, 2)[..., :width]


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def document_positions(segments_BT: Tensor) -> Tensor:
    """The position of each token in its own document, [B, T] int64."""
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    first_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return places_T - torch.where(first_BT, places_T, 0).cummax(dim=1).values


def document_mask(segments_BT: Tensor, flex: bool) -> Mask:
    """The keys that each token attends to, [B, T, T]: causal in its document; padding only itself."""
    rows, tokens = segments_BT.shape
    if flex:

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = segments_BT[row, query]
            return (own == segments_BT[row, key]) & (own != 0) & (query > key) | (query == key)

        return create_block_mask(sees, rows, None, tokens, tokens, device=segments_BT.device)
    itself_TT = torch.eye(tokens, dtype=torch.bool, device=segments_BT.device)
    causal_TT = torch.ones_like(itself_TT).tril_()
    same_BTT = segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)
    return same_BTT & causal_TT & (segments_BT != 0).unsqueeze(2) | itself_TT


def past_mask(lengths_B: Tensor, past: int, tokens: int, flex: bool) -> Mask:
    """The keys that each of `tokens` new tokens attends to, [B, T, P+T]: its past, then causal."""
    rows, device = len(lengths_B), lengths_B.device
    if flex:

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key < lengths_B[row]) | (key >= past) & (key - past <= query)

        return create_block_mask(sees, rows, None, tokens, past + tokens, device=device)
    places_P = torch.arange(past, device=device)
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril_()
    in_past = (places_P < lengths_B[:, None, None]).expand(rows, tokens, -1)
    return torch.cat([in_past, causal_TT.expand(rows, tokens, -1)], dim=2)


def position_order(lengths_B: Tensor, past: int, tokens: int) -> Ordered:
    """past_mask, with the keys of a row by their positions: its past, its own, then what nobody sees.

    A key's place decides which sums it enters first: so it depends on no other row's past.
    """
    places_M, lengths_B1 = torch.arange(past + tokens, device=lengths_B.device), lengths_B.unsqueeze(1)
    behind_BM = torch.where(places_M < lengths_B1 + tokens, places_M - lengths_B1 + past, places_M - tokens)
    order_BM = torch.where(places_M < lengths_B1, places_M, behind_BM)
    positions_BT = lengths_B1 + torch.arange(tokens, device=lengths_B.device)
    return Ordered(order_BM, places_M <= positions_BT.unsqueeze(2))


def causal_mask(tokens: int, device: torch.device, flex: bool) -> Mask:
    """The same for all rows."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(sees, None, None, tokens, tokens, device=device) if flex else None
