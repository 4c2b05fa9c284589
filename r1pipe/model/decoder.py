"""One decoder layer, with transformers' module names."""

from torch import Tensor, nn

from r1pipe.config import ModelConfig
from r1pipe.model.layers import RMSNorm, SwiGLU
from r1pipe.model.mla import MLA, Keep, Mask
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
        keep: Keep | None = None,
        past_BPW: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """`keep` and `past_BPW` as in MLA, `routing` as in MoE; a dense layer has nothing to route."""
        normed_BTD = self.input_layernorm(x_BTD)
        x_BTD = x_BTD + self.self_attn(normed_BTD, rotation_BTr, mask_BTM, keep, past_BPW)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            return x_BTD + self.mlp(normed_BTD, routing)
        return x_BTD + self.mlp(normed_BTD)

    def decode(
        self, x_SD: Tensor, rotation_Sr: Tensor, places_S: Tensor, entries_SMW: Tensor, unseen_SM: Tensor
    ) -> Tensor:
        """The same for one token per slot, on this layer's cache entries (see MLA.decode)."""
        normed_SD = self.input_layernorm(x_SD)
        x_SD = x_SD + self.self_attn.decode(normed_SD, rotation_Sr, places_S, entries_SMW, unseen_SM)
        return x_SD + self.mlp(self.post_attention_layernorm(x_SD))
