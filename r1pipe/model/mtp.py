"""Multi-token prediction (V3 section 2.2): layers after the last that each predict one token further.

Depth k reads at position i the state of depth k-1 (depth 0: the model) and the embedding of token i+k, and
predicts token i+k+1:

    h_i^k = norm(layer(eh_proj(cat(enorm(embedding of t_{i+k}), hnorm(h_i^{k-1})))))

**Pre- or post-norm.** The paper does not say whether the model's state is taken before or after its last
norm (equation 21: "the representation given by the main model"), and no training code is published. Here it
is after, as in vLLM, where `deepseek_mtp.py` reads the output of `DeepseekV2Model.forward`, which ends with
the norm. Pull request 1764 of ROCm/ATOM found the same in the modelling code of a published R1 checkpoint and
measured more accepted drafts. (Pull request 24025 of llama.cpp claims the opposite, without a measurement.)
Between depths it is likewise after `shared_head.norm` (vLLM's pull request 47448). Unlike vLLM, the embedding
at position 0 is not set to zero, and the one published layer does not serve several depths.

Embedding and head are the model's; published files hold copies of them under the layer's name.
"""

import torch
from torch import Tensor

from r1pipe.config import ModelConfig
from r1pipe.model.logprobs import Head


def ahead(values_BT: Tensor, steps: int, fill: int) -> Tensor:
    """The value `steps` positions to the right of each; `fill` beyond the row's end."""
    padding = torch.full_like(values_BT[:, :steps], fill)
    return torch.cat([values_BT[:, steps:], padding], dim=1)


def same_document(segments_BT: Tensor, steps: int) -> Tensor:
    """Whether the token `steps` to the right is in the same document; bool [B, T], false for padding."""
    return (segments_BT != 0) & (ahead(segments_BT, steps, 0) == segments_BT)


def mtp_loss_sum(
    head: Head,
    depths: list[Tensor],
    tokens_BT: Tensor,
    segments_BT: Tensor,
    loss_BT: Tensor,
) -> Tensor:
    """Sum of -log p of the learned tokens, in nats, mean over depths (V3 equations 24 and 25 without lambda).

    `depths` are the states hidden_BTD of depth 1, 2...; depth k learns a token in `loss_BT` if the position
    that predicts it, k+1 to its left, is in the same document.
    """
    total = tokens_BT.new_zeros((), dtype=torch.float32)
    for depth, hidden_BTD in enumerate(depths, 1):
        learned_BT = ahead(loss_BT, depth + 1, 0) & same_document(segments_BT, depth + 1)
        targets_N = ahead(tokens_BT, depth + 1, 0)[learned_BT]
        total = total - head(hidden_BTD[learned_BT], targets_N).sum()
    return total / len(depths)


def stored_copies(config: ModelConfig) -> dict[str, str]:
    """Each MTP layer's copies of embedding and head in published files -> the model's own tensors."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    first = config.num_hidden_layers
    copies = {}
    for layer in range(first, first + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies
