"""How long a step takes, by part: what r1pipe.plan.work counts, over the speeds of conf/cluster."""

from dataclasses import dataclass, fields

from r1pipe.config.planning import ClusterConfig, LayoutConfig
from r1pipe.plan.memory import Held
from r1pipe.plan.work import Work, crosses

TERA, GIGA = 1e12, 1e9
BACKWARD = 2.0  # of a product: by its input and by its weight
ATTENTION_BACKWARD = 2.5  # scores are made again: five products beside two
TRAFFIC_BACKWARD = 2.0  # results are read again; gradients are written and read


@dataclass(frozen=True)
class Seconds:
    """Of one device."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0  # norms, SwiGLU, rotations, sorting rows by expert: what waits for memory
    all_to_all: float = 0.0  # not hidden behind computing
    bubble: float = 0.0
    gathers: float = 0.0  # of weights and gradients over the ranks that share them, not hidden
    optimizer: float = 0.0
    sampling: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def plus(self, other: "Seconds", times: float = 1.0) -> "Seconds":
        return Seconds(**{part: own + times * getattr(other, part) for part, own in self.parts().items()})


def of_tokens(work: Work, layout: LayoutConfig, cluster: ClusterConfig, backward: bool) -> Seconds:
    """Of a token's passes through all layers on one device, at the speeds of single kernels."""
    full = backward and layout.recompute in ("full", "offload")
    selective = backward and layout.recompute == "selective"
    passes = 1 + BACKWARD * backward + full
    peak = TERA * (cluster.fp32_tflops if layout.precision == "fp32" else cluster.bf16_tflops)
    high = low = peak * cluster.bf16_efficiency
    if layout.precision == "fp8" and cluster.fp8_tflops is not None:
        low = cluster.fp8_tflops * TERA * cluster.fp8_efficiency
    products = (passes * work.low + selective * work.again) / low + passes * work.high / high
    attention = (1 + ATTENTION_BACKWARD * backward + full) * work.attention
    moved = (1 + TRAFFIC_BACKWARD * backward + full) * work.traffic + selective * work.traffic_again
    far = crosses(layout.expert_parallel, cluster)
    sending = (1 + backward + full) * work.sent / link(cluster, far)
    return Seconds(
        products=products,
        attention=attention / (peak * cluster.attention_efficiency),
        memory=moved / bandwidth(cluster),
        all_to_all=sending * exposed(layout, cluster),
    )


def training_step(
    work: Work, held: Held, layout: LayoutConfig, cluster: ClusterConfig, tokens: int, micro_batches: int
) -> Seconds:
    """Of an optimizer step: `micro_batches` on each pipeline, of so many tokens on a rank each."""
    passed = tokens * micro_batches / layout.pipeline  # as if each had gone through all layers
    if layout.mfu is not None:
        return Seconds(products=3 * work.forward * passed / (cluster.bf16_tflops * TERA * layout.mfu))
    busy = Seconds().plus(of_tokens(work, layout, cluster, backward=True), passed)
    step = busy.plus(
        Seconds(
            bubble=busy.total * bubble(layout, micro_batches),
            gathers=gathers(held, layout, cluster, micro_batches) * exposed(layout, cluster),
            optimizer=2 * (held.states.moments + held.states.weights) / bandwidth(cluster),
        )
    )
    return Seconds().plus(step, 1 / cluster.sustained)


def bubble(layout: LayoutConfig, micro_batches: int) -> float:
    """Waiting over working, where a backward pass takes twice a forward pass and half of it is by weights.

    F = 1, B = 2, W = 1, F&B = 3 (the table of DeepSeek-V3's section 3.2.1; Megatron's for virtual stages).
    """
    ranks, working = layout.pipeline, 3.0 * micro_batches
    match layout.schedule:
        case "1f1b":
            waiting = (ranks - 1) * 3.0 / layout.virtual_stages
        case "zb1p":
            waiting = (ranks - 1) * 1.0
        case "zbv":  # a rank begins after another; two stages of half the layers on each
            waiting = (ranks - 1) * 0.5
        case "dualpipe":
            waiting = (ranks / 2 - 1) * 2.0
        case _:  # dualpipev: two stages of half the layers on each rank
            waiting = (ranks - 1) * 1.0
    return max(0.0, waiting) / working


def gathers(held: Held, layout: LayoutConfig, cluster: ClusterConfig, micro_batches: int) -> float:
    """Seconds of collectives over weights and gradients in an optimizer step, by the ZeRO level."""
    if layout.zero_level == 0:  # all-reduce
        moved = 2.0 * held.gradient
    elif layout.zero_level < 3:  # gradients scattered, weights gathered once
        moved = float(held.gradient + held.weight)
    else:  # weights gathered for both passes of each micro-batch
        moved = micro_batches * (held.gradient + 2.0 * held.weight)
    weights = held.dense * (1 - 1 / held.dense_ranks) + held.experts * (1 - 1 / held.expert_ranks)
    return moved * held.copies * weights / link(cluster, crosses(held.dense_ranks, cluster))


def decoding(work: Work, read: float, cached: float, rows: int, cluster: ClusterConfig) -> float:
    """Seconds to sample a further token of `rows` completions together on one device, `read` bytes for it.

    `cached`: tokens of each that are looked back on. Products are taken as in BF16. Latencies of kernels and
    of all-to-alls are not counted: on GPUs, few rows and small models take longer.
    """
    peak = cluster.bf16_tflops * TERA
    products = rows * (work.low + work.high) / (peak * cluster.bf16_efficiency)
    attention = rows * work.lookup * cached / (peak * cluster.attention_efficiency)
    return max(products + attention, read / bandwidth(cluster)) / cluster.sustained


def exposed(layout: LayoutConfig, cluster: ClusterConfig) -> float:
    return 1 - cluster.hidden if layout.overlap else 1.0


def bandwidth(cluster: ClusterConfig) -> float:
    """Bytes a second of a device's memory."""
    return cluster.memory_tb_s * TERA * cluster.memory_efficiency


def link(cluster: ClusterConfig, far: bool) -> float:
    """Bytes a second of a device to others, on other machines or on its own."""
    gigabytes = cluster.inter_node_gb_s if far else cluster.intra_node_gb_s
    return gigabytes * GIGA * cluster.link_efficiency
