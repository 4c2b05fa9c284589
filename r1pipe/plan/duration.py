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
    all_to_all: float = 0.0  # of tokens to their experts, not hidden behind computing
    exchange: float = 0.0  # between ranks that share a sequence, before and after attention; never hidden
    bubble: float = 0.0
    gathers: float = 0.0  # of weights and gradients over the ranks that share them, not hidden
    optimizer: float = 0.0
    sampling: float = 0.0
    refit: float = 0.0  # new weights' way to a sampler with others than the trainer's

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
    low, high = speeds(layout, cluster)
    products = (passes * work.low + selective * work.again) / low + passes * work.high / high
    attention = (1 + full) * work.attention / cluster.attention_efficiency
    attention += ATTENTION_BACKWARD * backward * work.attention / cluster.attention_backward_efficiency
    moved = (1 + TRAFFIC_BACKWARD * backward + full) * work.traffic + selective * work.traffic_again
    far = crosses(layout.expert_parallel, cluster)
    sending = (1 + backward + full) * work.sent / link(cluster, far)
    exchanged = (1 + backward + full) * work.exchanged + selective * work.exchanged_again
    return Seconds(
        products=products,
        attention=attention / peak(layout, cluster),
        memory=moved / bandwidth(cluster),
        all_to_all=sending * exposed(layout, cluster),
        exchange=exchanged / link(cluster, crosses(work.sharing, cluster)),
    )


def peak(layout: LayoutConfig, cluster: ClusterConfig) -> float:
    """FLOPs a second of what is not in FP8."""
    return TERA * (cluster.fp32_tflops if layout.precision == "fp32" else cluster.bf16_tflops)


def speeds(layout: LayoutConfig, cluster: ClusterConfig) -> tuple[float, float]:
    """FLOPs a second of the products that FP8 speeds up, and of the others."""
    high = peak(layout, cluster) * cluster.bf16_efficiency
    if layout.precision == "fp8" and cluster.fp8_tflops is not None:
        return cluster.fp8_tflops * TERA * cluster.fp8_efficiency, high
    return high, high


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
            bubble=bubble(layout, Passes.of(work, layout, cluster, tokens)),
            gathers=gathers(held, layout, cluster, micro_batches) * exposed(layout, cluster),
            optimizer=2 * (held.states.moments + held.states.weights) / bandwidth(cluster),
        )
    )
    return Seconds().plus(step, 1 / cluster.sustained)


@dataclass(frozen=True)
class Passes:
    """Seconds of a micro-batch's passes through all that one rank of a pipeline has."""

    forward: float
    backward: float  # by inputs and by weights
    weights: float  # of it, what can wait: products alone, as attention has no weights

    @classmethod
    def of(cls, work: Work, layout: LayoutConfig, cluster: ClusterConfig, tokens: int) -> "Passes":
        """Of `tokens` on each rank."""
        each = tokens / layout.pipeline  # as if each had gone through all layers
        forward, both = (of_tokens(work, layout, cluster, backward).total for backward in (False, True))
        low, high = speeds(layout, cluster)
        return cls(each * forward, each * (both - forward), each * (work.low / low + work.high / high))


def bubble(layout: LayoutConfig, one: Passes) -> float:
    """Seconds that a rank waits in a step.

    The formulas of DeepSeek-V3's table 2, Megatron's for virtual stages, and r1pipe.plan.timeline's for zbv;
    zbv and dualpipev have two stages of half the layers on each rank. Passes that overlap take as long as one
    after the other, less what of communication is hidden.
    """
    ranks, halves = layout.pipeline, layout.pipeline / 2
    forward, backward, weights = one.forward, one.backward, one.weights
    match layout.schedule:
        case "1f1b":
            waiting = (ranks - 1) * (forward + backward) / layout.virtual_stages
        case "zb1p":
            waiting = (ranks - 1) * (forward + backward - 2 * weights)
        case "zbv":
            waiting = (ranks - 1) * max(forward, backward - weights, weights) / 2
        case "dualpipe":
            waiting = (halves - 1) * (forward + 2 * backward - 3 * weights)
        case _:  # dualpipev, as dualpipe on twice the ranks
            waiting = (ranks - 1) * (forward + 2 * backward - 3 * weights) / 2
    return max(0.0, waiting)


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


def exposed(layout: LayoutConfig, cluster: ClusterConfig) -> float:
    return 1 - cluster.hidden if layout.overlap else 1.0


def bandwidth(cluster: ClusterConfig) -> float:
    """Bytes a second of a device's memory."""
    return cluster.memory_tb_s * TERA * cluster.memory_efficiency


def link(cluster: ClusterConfig, far: bool) -> float:
    """Bytes a second of a device to others, on other machines or on its own."""
    gigabytes = cluster.inter_node_gb_s if far else cluster.intra_node_gb_s
    return gigabytes * GIGA * cluster.link_efficiency
