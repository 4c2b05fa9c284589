"""What a token of training or sampling asks of a device: products, memory traffic, bytes to other devices.

All is of one token in a whole pass through the model; r1pipe.plan.duration turns it into seconds.
"""

from dataclasses import dataclass
from math import comb

from r1pipe.config import ModelConfig
from r1pipe.config.planning import ClusterConfig, LayoutConfig
from r1pipe.plan.sizes import (
    HALF,
    Weights,
    layer_elements,
    moe_layers,
    recomputed,
    stored,
    visited,
    weight_bytes,
)

SCALE = 4 / 128  # bytes of a float32 scale for each of 128 FP8 numbers


@dataclass(frozen=True)
class Work:
    """One token's forward pass; FLOPs count a multiplication and an addition as two."""

    low: float  # FLOPs of products that FP8 speeds up: projections, SwiGLUs, experts
    high: float  # FLOPs of products that stay in BF16: heads and gates
    attention: float  # FLOPs of scores and values of causal attention
    lookup: float  # FLOPs of attention for each cached token that a decoded one looks back on (MLA, absorbed)
    traffic: float  # bytes that a layer's results take to write and to read once
    sent: float  # bytes to other ranks, in both all-to-alls of every MoE layer
    # what selective recomputation does again in the backward pass
    again: float  # FLOPs of products that FP8 speeds up
    traffic_again: float  # bytes
    # what ranks that share a sequence exchange, so that each has all tokens of a part of the heads
    sharing: int = 1  # ranks
    exchanged: float = 0.0  # bytes to other ranks, of queries, keys, values and results in every layer
    exchanged_again: float = (
        0.0  # bytes, of queries, keys and values that selective recomputation makes again
    )

    @property
    def forward(self) -> float:
        """The model's FLOPs of a token's forward pass: a third of those that MFU counts in training."""
        return self.low + self.high + self.attention


def work(
    model: ModelConfig, layout: LayoutConfig, cluster: ClusterConfig, length: int, sharing: int = 1
) -> Work:
    """Of a token in a sequence of `length` that `sharing` ranks share, multi-token prediction included."""
    one, moe, extra = Weights.of(model), moe_layers(model), model.num_nextn_predict_layers
    layers = model.num_hidden_layers + extra
    products = layers * one.attention + model.first_k_dense_replace * one.dense
    products += moe * visited(model) * one.expert + extra * one.joining
    heads, value = model.num_attention_heads, model.v_head_dim
    key = model.qk_nope_head_dim + model.qk_rope_head_dim
    # a token looks back on half the sequence, on average
    core = length * heads * (key + value)
    exchanging = layers * heads * HALF * elsewhere(sharing, cluster)
    each = 2 * weight_bytes(layout.precision)  # written and read
    elements = stored(model, "none") + extra * layer_elements(model, False)[1]
    dense, sparse = recomputed(model)
    return Work(
        low=2 * products,
        high=2 * (moe * one.gate + (1 + extra) * one.vocabulary),
        attention=layers * core,
        lookup=2 * layers * heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim),
        traffic=each * elements,
        sent=moe * sent(model, layout, cluster),
        again=2 * layers * one.up_projections,
        traffic_again=each * (model.first_k_dense_replace * dense + moe * sparse),
        sharing=sharing,
        exchanged=exchanging * 2 * (key + value),
        exchanged_again=exchanging * (2 * key + value),
    )


def elsewhere(ranks: int, cluster: ClusterConfig) -> float:
    """Share of an all-to-all's bytes that leave the device, or the machine where the ranks sit on several."""
    places = ranks // cluster.devices_per_node if crosses(ranks, cluster) else ranks
    return (places - 1) / places


def sent(model: ModelConfig, layout: LayoutConfig, cluster: ClusterConfig) -> float:
    """Bytes that leave the device, or the machine, for a token's dispatch and combine in one MoE layer.

    A token goes once to each machine that has experts of its (DeepEP), and its groups of experts limit which
    these may be: groups lie on machines one after the other.
    """
    places = layout.expert_parallel
    if crosses(layout.expert_parallel, cluster):
        places = layout.expert_parallel // cluster.devices_per_node
    groups, kept = model.n_group, model.topk_group
    if groups % places:  # a group lies on several
        allowed = max(1.0, places * kept / groups)
    else:  # the expected number of places that the kept groups lie on
        allowed = places * (1 - comb(groups - groups // places, kept) / comb(groups, kept))
    reached = allowed * (1 - (1 - 1 / allowed) ** model.num_experts_per_tok)
    leaving = reached * (places - 1) / places
    each = (1 + SCALE if layout.fp8_dispatch else HALF) + HALF
    return leaving * each * model.hidden_size


def crosses(ranks: int, cluster: ClusterConfig) -> bool:
    """Whether so many ranks that work together sit on several machines."""
    return ranks > cluster.devices_per_node
