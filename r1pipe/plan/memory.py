"""What one rank of a layout holds, by part; the formulas are those of r1pipe.plan.sizes.

The pipelines that the engine has are cut as it cuts them. In others ranks are taken to be alike: embedding,
head and multi-token prediction are spread over all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from r1pipe.config import ModelConfig
from r1pipe.config.planning import ClusterConfig, LayoutConfig
from r1pipe.plan import sizes
from r1pipe.plan.cut import Cut, cuts
from r1pipe.plan.sizes import States, Weights

GIGA = 1e9
OWN = ("1f1b", "zbv", "dualpipev")  # schedules that the engine has
MODULE = 4  # bytes of buffers for each weight of the largest module, at ZeRO level 3 (DeepSpeed's estimator)


@dataclass(frozen=True)
class Held:
    """Weights of one pipeline rank before ZeRO shares them, and over how many ranks it does."""

    dense: float  # number of weights outside routed experts, of one copy
    experts: float  # number of weights of the routed experts of this rank, of one copy
    copies: int  # DualPipe has both ends of the pipeline on each rank
    dense_ranks: int  # ranks beside each other, which share a copy
    expert_ranks: int
    weight: int  # bytes of a weight
    gradient: int  # bytes of its gradient
    optimizer: int  # bytes of AdamW for it: moments and float32 master
    level: int  # of ZeRO

    @classmethod
    def of(
        cls, model: ModelConfig, layout: LayoutConfig, cluster: ClusterConfig, among: int | None = None
    ) -> "Held":
        """Of a model that is spread evenly `among` so many ranks of a pipeline (None: all)."""
        ranks, routed = cluster.devices // layout.pipeline, sizes.routed(model)
        among = among or layout.pipeline
        return cls(
            (sizes.parameters(model) - routed) / among,
            routed / among / layout.expert_parallel,
            2 if layout.schedule == "dualpipe" and layout.pipeline > 1 else 1,
            ranks,
            ranks // layout.expert_parallel,
            sizes.weight_bytes(layout.precision),
            layout.gradient_bytes,
            sizes.optimizer_bytes(layout.precision, layout.moments, layout.zero_level),
            layout.zero_level,
        )

    @property
    def states(self) -> States:
        """Bytes of this rank; both copies share the optimizer's states, if ranks do."""
        each = {"weight": self.weight, "gradient": self.gradient, "optimizer": self.optimizer}
        dense, experts = (
            sizes.states(weights, weights, level=self.level, ranks=ranks, **each)
            for weights, ranks in ((self.dense, self.dense_ranks), (self.experts, self.expert_ranks))
        )
        return States(
            self.copies * (dense.weights + experts.weights),
            self.copies * (dense.gradients + experts.gradients),
            (1 if self.level else self.copies) * (dense.moments + experts.moments),
        )


@dataclass(frozen=True)
class Rollout:
    """What reinforcement samples before it learns from it."""

    prompts: int  # of a rollout batch
    prompt: int  # tokens of one
    completions: int  # of a rollout batch
    mean: int  # tokens of a completion
    steps: int  # optimizer steps that learn from it
    epochs: int  # passes over it
    longest: int  # tokens of the longest completion, which all ranks wait for
    slots: int  # completions that are decoded together on one device at most
    reference: bool  # whether a reference model scores them
    judges: int  # reward models, which have no head
    server: float | None = None  # share of each device that a vLLM server takes to sample; 0: it is elsewhere

    def rows(self, devices: int) -> int:
        """Completions that are decoded together on one device."""
        return min(self.slots, math.ceil(self.completions / devices))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    moments: float  # with the float32 masters
    activations: float
    logits: float
    frozen: float  # a reference and reward models, which ZeRO level 3 shares
    sampler: float  # weights that decoding needs beside the rank's own
    cache: float  # of the sampler; all that a vLLM server takes
    buffers: float
    before: float = 0.0  # weights and cache of who answers before training begins

    @property
    def total(self) -> float:
        """Training and sampling alternate; what is held `before` training makes room for it."""
        states = self.weights + self.gradients + self.moments + self.frozen
        steps = states + max(self.activations + self.logits, self.sampler + self.cache)
        return self.buffers + max(self.before, steps)

    def gigabytes(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) / GIGA for field in fields(self)}


def memory(
    model: ModelConfig,
    layout: LayoutConfig,
    cluster: ClusterConfig,
    tokens: int,
    micro_batches: int,
    rollout: Rollout | None = None,
    length: int = 0,
) -> Memory:
    """Of the rank that needs most. `tokens` of a micro-batch on a rank, in rows of `length` (0: one row)."""
    if layout.pipeline > 1 and layout.schedule in OWN and layout.virtual_stages == 1:
        shares: Sequence[Cut[ModelConfig]] = cuts(model, layout.schedule, layout.pipeline, micro_batches)
        among = 1
    else:
        shares = [Cut(model, in_flight(layout, micro_batches))]
        among = layout.pipeline
    row = length or tokens
    ranks = [of_rank(model, share, among, layout, cluster, tokens, row, rollout) for share in shares]
    return max(ranks, key=lambda rank: rank.total)


def of_rank(
    model: ModelConfig,
    share: Cut[ModelConfig],
    among: int,
    layout: LayoutConfig,
    cluster: ClusterConfig,
    tokens: int,
    length: int,
    rollout: Rollout | None,
) -> Memory:
    """Of a rank that has an equal part of `share`, `among` others; `model` is the whole one."""
    held = Held.of(share.model, layout, cluster, among)
    own, one = held.states, Weights.of(share.model)
    largest = max(one.vocabulary, one.expert * model.n_routed_experts // layout.expert_parallel)
    row = 0 if cluster.fused else length
    kept: float = held.weight * sizes.stored(share.model, layout.recompute, row)
    if layout.precision == "fp8" and layout.recompute == "selective":
        kept -= sizes.in_eight_bits(share.model)
    kept = share.passes * (kept + held.weight * share.between)
    kept += held.weight * sizes.working(model, layout.recompute, row)
    frozen = sampler = cache = 0.0
    if rollout is not None:
        frozen = rollout.reference * frozen_weights(share.model, layout, held) / among
        frozen += rollout.judges * sizes.trunk(model) / (held.dense_ranks if layout.zero_level == 3 else 1)
        frozen *= held.weight
        entry = held.weight * model.num_hidden_layers * sizes.cache_entry(model)
        longest = min(rollout.prompt + rollout.longest, model.max_position_embeddings)
        cache = rollout.rows(cluster.devices) * longest * entry
        if rollout.server is None:
            sampler = max(0.0, held.weight * sizes.without_mtp(model) - own.weights)
        else:
            cache = rollout.server * cluster.memory_gb * GIGA  # with its weights
    return Memory(
        weights=own.weights,
        gradients=own.gradients + held.weight * share.at_once * (held.dense + held.experts),
        moments=own.moments,
        activations=tokens * kept,
        logits=sizes.logits(tokens, share.model.vocab_size),
        frozen=frozen,
        sampler=sampler,
        cache=cache,
        buffers=cluster.reserved_gb * GIGA + (MODULE * largest if layout.zero_level == 3 else 0.0),
    )


def frozen_weights(model: ModelConfig, layout: LayoutConfig, held: Held) -> float:
    """Number of weights that a rank has of a reference."""
    if layout.zero_level == 3:
        return sizes.without_mtp(model) / held.dense_ranks
    return decoder_weights(model, layout)


def decoder_weights(model: ModelConfig, layout: LayoutConfig) -> float:
    """Number of weights of all layers but those of multi-token prediction, experts spread as in training."""
    plain = sizes.without_mtp(model)
    routed = sizes.routed(replace(model, num_nextn_predict_layers=0))
    return plain - routed + routed / layout.expert_parallel


def in_flight(layout: LayoutConfig, micro_batches: int) -> float:
    """Of how many micro-batches a rank keeps activations, as a share of all layers' (V3 section 3.2.1)."""
    ranks = layout.pipeline
    if ranks == 1:
        return 1.0
    match layout.schedule:
        case "1f1b":  # the first rank; more with virtual stages (Megatron's interleaved schedule)
            kept = ranks + (ranks - 1) / layout.virtual_stages * (layout.virtual_stages > 1)
        case "zb1p" | "zbv":
            kept = float(ranks)
        case "dualpipe":
            kept = ranks + 1.0
        case _:  # dualpipev, as dualpipe on twice the ranks with half the layers each
            kept = ranks + 0.5
    return min(kept, micro_batches) / ranks
