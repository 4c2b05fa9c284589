"""What one rank of a layout holds, by part; the formulas are those of r1pipe.plan.sizes.

Pipeline ranks are taken to be alike: embedding, head and multi-token prediction are spread over all.
"""

from dataclasses import dataclass, fields

from r1pipe.config import ModelConfig
from r1pipe.config.planning import ClusterConfig, LayoutConfig
from r1pipe.plan import sizes
from r1pipe.plan.sizes import FULL, HALF, Weights

GIGA = 1e9
MODULE = 4  # bytes of buffers for each weight of the largest module, at ZeRO level 3 (DeepSpeed's estimator)


@dataclass(frozen=True)
class Held:
    """Weights of one pipeline rank before ZeRO shares them, and over how many ranks it does."""

    dense: float  # number of weights outside routed experts
    experts: float  # number of weights of the routed experts of this rank
    dense_ranks: int
    expert_ranks: int
    gradient: int  # bytes of a weight's gradient
    optimizer: int  # bytes of AdamW for a weight: moments and float32 master
    trained: float  # number of weights whose optimizer states this rank has

    @classmethod
    def of(cls, model: ModelConfig, layout: LayoutConfig, cluster: ClusterConfig) -> "Held":
        copies = (
            2 if layout.schedule == "dualpipe" and layout.pipeline > 1 else 1
        )  # both ends of the pipeline
        ranks = cluster.devices // layout.pipeline
        routed = sizes.routed(model)
        dense = copies * (sizes.parameters(model) - routed) / layout.pipeline
        experts = copies * routed / layout.pipeline / layout.expert_parallel
        expert_ranks = ranks // layout.expert_parallel
        shared = layout.zero_level >= 1
        trained = dense / (copies * ranks if shared else 1) + experts / (
            copies * expert_ranks if shared else 1
        )
        optimizer = FULL + 2 * (FULL if layout.moments == "fp32" else HALF)
        return cls(dense, experts, ranks, expert_ranks, layout.gradient_bytes, optimizer, trained)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    moments: float  # with the float32 masters
    activations: float
    logits: float
    reference: float  # of a reference model, shared as the policy's weights are
    sampler: float  # weights that decoding needs beside the rank's own
    cache: float  # of the sampler
    buffers: float

    @property
    def total(self) -> float:
        """Training and sampling alternate."""
        states = self.weights + self.gradients + self.moments + self.reference + self.buffers
        return states + max(self.activations + self.logits, self.sampler + self.cache)

    def gigabytes(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) / GIGA for field in fields(self)}


def memory(
    model: ModelConfig,
    layout: LayoutConfig,
    cluster: ClusterConfig,
    tokens: int,
    micro_batches: int,
    reference: bool = False,
    rows: int = 0,
    length: float = 0.0,
) -> Memory:
    """`tokens` of a micro-batch on a rank, which samples `rows` completions of `length` tokens together."""
    held = Held.of(model, layout, cluster)
    each = {
        "weight": HALF,
        "gradient": held.gradient,
        "optimizer": held.optimizer,
        "level": layout.zero_level,
    }
    dense, experts = (
        sizes.states(weights, weights, ranks=ranks, **each)
        for weights, ranks in ((held.dense, held.dense_ranks), (held.experts, held.expert_ranks))
    )
    own = dense.weights + experts.weights
    one = Weights.of(model)
    largest = max(one.vocabulary, one.expert * model.n_routed_experts // layout.expert_parallel)
    kept: float = HALF * sizes.stored(model, layout.recompute)
    if layout.precision == "fp8" and layout.recompute == "selective":
        kept -= sizes.in_eight_bits(model)
    kept = kept * in_flight(layout, micro_batches) + HALF * sizes.working(model, layout.recompute)
    decoding = HALF * decoder_weights(model, layout) if rows else 0.0
    return Memory(
        weights=own,
        gradients=dense.gradients + experts.gradients,
        moments=held.optimizer * held.trained,
        activations=tokens * kept,
        logits=sizes.logits(tokens, model.vocab_size),
        reference=own if reference else 0.0,
        sampler=max(0.0, decoding - own),
        cache=rows * length * HALF * model.num_hidden_layers * sizes.cache_entry(model),
        buffers=cluster.reserved_gb * GIGA + (MODULE * largest if layout.zero_level == 3 else 0.0),
    )


def decoder_weights(model: ModelConfig, layout: LayoutConfig) -> float:
    """Number of weights that a rank decodes with: all layers, their experts spread as in training."""
    plain = sizes.without_mtp(model)
    routed = sizes.routed(model) * (1 - model.num_nextn_predict_layers / sizes.moe_layers(model))
    return plain - routed + routed / layout.expert_parallel


def in_flight(layout: LayoutConfig, micro_batches: int) -> float:
    """Of how many micro-batches a rank keeps activations, as a share of all layers' (V3 section 3.2.1)."""
    ranks = layout.pipeline
    if ranks == 1:
        return 1.0
    match layout.schedule:
        case "1f1b":  # the first rank; more with virtual stages (Megatron's interleaved schedule)
            kept = ranks + (ranks - 1) / layout.virtual_stages * (layout.virtual_stages > 1)
        case "zb1p":
            kept = float(ranks)
        case "dualpipe":
            kept = ranks + 1.0
        case _:  # dualpipev, as dualpipe on twice the ranks with half the layers each
            kept = ranks + 0.5
    return min(kept, micro_batches) / ranks
