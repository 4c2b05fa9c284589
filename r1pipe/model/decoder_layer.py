"""One layer of the DeepSeek-V3 decoder, and of its multi-token prediction. Axes as in layers.py."""

import torch
from torch import Tensor, nn

from r1pipe.config.model import ModelConfig
from r1pipe.model.layers import Linear, RMSNorm, SwiGLU
from r1pipe.model.mla import MLA, Mask
from r1pipe.model.moe import MoE, Routing


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.self_attn = MLA(config)
        dense = index < config.first_k_dense_replace
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotation_BTr: Tensor,
        mask_BTM: Mask,
        keeps: bool = False,
        past_BPW: Tensor | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, ...]:
        """-> x_BTD, with `keeps` the cache entries, and the balance loss that `routing` may ask for: all that
        a gradient may come through. `past_BPW` as in MLA, `routing` as in MoE."""
        x_BTD, *kept = self.attend(x_BTD, rotation_BTr, mask_BTM, keeps, past_BPW)
        x_BTD, *balance = self.transform(x_BTD, routing or Routing())
        return (x_BTD, *kept, *balance)

    def attend(
        self, x_BTD: Tensor, rotation_BTr: Tensor, mask_BTM: Mask, keeps: bool, past_BPW: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The layer's first half: -> x_BTD, with `keeps` the cache entries."""
        kept: list[Tensor] = []
        keep = kept.append if keeps else None
        normed_BTD = self.input_layernorm(x_BTD)
        return (x_BTD + self.self_attn(normed_BTD, rotation_BTr, mask_BTM, keep, past_BPW), *kept)

    def transform(self, x_BTD: Tensor, routing: Routing) -> tuple[Tensor, ...]:
        """Its second half: -> x_BTD, and the balance loss that `routing` may ask for."""
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if not isinstance(self.mlp, MoE):
            return (x_BTD + self.mlp(normed_BTD),)
        x_BTD = x_BTD + self.mlp(normed_BTD, routing)
        return (x_BTD,) if routing.balance is None else (x_BTD, routing.balance)

    def decode(
        self, x_SD: Tensor, rotation_Sr: Tensor, places_S: Tensor, entries_SMW: Tensor, unseen_SM: Tensor
    ) -> Tensor:
        """The same for one token per slot, on this layer's cache entries (see MLA.decode)."""
        normed_SD = self.input_layernorm(x_SD)
        x_SD = x_SD + self.self_attn.decode(normed_SD, rotation_Sr, places_S, entries_SMW, unseen_SM)
        return x_SD + self.mlp(self.post_attention_layernorm(x_SD))


class MTPLayer(DecoderLayer):
    """A decoder layer that reads a state joined with an embedding; stored as model.layers.(L + depth - 1)."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        # the norm before the head, which is the model's own
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def joined(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """The layer's input: both [..., D] -> [..., D], the embedding first."""
        return self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
