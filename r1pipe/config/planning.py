"""What the planner reads beside a run's config: conf/cluster (hardware) and conf/plan (layout and phases).

`cluster=NAME`, `layout=NAME` and keys below them (`cluster.usd_per_hour=3`, `layout.pipeline=8`) are for
`r1pipe plan` alone: a job's config.json has none of them.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from r1pipe.config.fields import (
    AboveZero,
    NonNegative,
    Positive,
    Rules,
    Share,
    Strict,
    build,
    check_all,
)
from r1pipe.config.groups import options, read
from r1pipe.config.model import ModelConfig
from r1pipe.core.errors import ConfigError, nearest

GROUPS = {"cluster": "cluster", "layout": "plan"}  # key -> folder of conf/
Efficiency = Annotated[float, Field(gt=0, le=1)]


@dataclass
class ClusterConfig(Strict):
    """Machines of one kind, and what their parts reach of their peaks in published measurements."""

    name: str  # the file in conf/cluster/
    unit: Literal["GPU", "core"]  # what a device is
    devices: Positive  # in all
    devices_per_node: Positive  # on each machine
    memory_gb: AboveZero  # of each device, in 1e9 bytes
    reserved_gb: (
        NonNegative  # of it, for CUDA's context, NCCL's buffers and fragments; of a process, for libraries
    )
    fp32_tflops: AboveZero  # peak of each device
    bf16_tflops: AboveZero  # peak of each device, dense
    fused: bool  # fused kernels compute norms, SwiGLU and attention; false: a CPU without AVX2
    fp8_tflops: AboveZero | None  # peak of each device, dense; null: no FP8
    memory_tb_s: AboveZero  # bandwidth of each device's memory
    intra_node_gb_s: AboveZero  # bandwidth of each device to others of its machine, one direction
    inter_node_gb_s: AboveZero  # bandwidth of each device to other machines, one direction
    bf16_efficiency: Efficiency  # share of the peak that BF16 and float32 products reach
    fp8_efficiency: Efficiency  # share of the peak that FP8 products reach
    attention_efficiency: Efficiency  # share of the same peak that the attention core reaches, forward
    attention_backward_efficiency: Efficiency  # the same, backward
    memory_efficiency: Efficiency  # share of the memory's bandwidth that a copy reaches
    link_efficiency: Efficiency  # share of a link's bandwidth that an all-to-all reaches
    layer_latency_us: NonNegative  # of a layer that decodes a token on one machine, beside reading weights
    far_layer_latency_us: NonNegative  # the same where machines decode a token together
    sustained: Efficiency  # share of the speed of these parts that a whole training step keeps
    hidden: Share  # share of communication that overlapping it with computing hides
    usd_per_hour: NonNegative  # price of a device
    watts: NonNegative  # power of a device under load, with its share of the machine


@dataclass
class PhaseConfig(Strict):
    """A part of a training whose steps are alike."""

    name: str  # its line in the ledger; several phases may share one
    tokens: AboveZero  # in all
    sequence_length: Positive  # tokens of a sequence
    batch_size: Positive  # sequences per optimizer step
    context_parallel: Positive  # ranks that share a sequence


@dataclass
class LayoutConfig(Strict):
    """How a model is spread over a cluster, and what it is trained on."""

    name: str  # the file in conf/plan/
    precision: Literal["fp32", "bf16", "fp8"]  # of products; with fp8, weights are stored in bf16
    zero_level: Literal[0, 1, 2, 3]  # ranks share: nothing, optimizer state, gradients too, weights too
    expert_parallel: Positive  # ranks over which a layer's experts are spread
    pipeline: Positive  # pipeline ranks; 1: none
    virtual_stages: Positive  # stages of each pipeline rank, with 1f1b (Megatron's interleaving)
    schedule: Literal["1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"]  # the order of passes in the pipeline
    overlap: bool  # communication while computing
    micro_batch: Positive  # sequences of a micro-batch
    recompute: Literal["none", "selective", "full", "offload"]  # selective: norms, SwiGLU, up-projections
    moments: Literal["fp32", "bf16"]  # AdamW's
    gradient_bytes: Annotated[int, Field(ge=2, le=8)]  # of a weight's gradient, in memory and on the links
    fp8_dispatch: bool  # tokens go to their experts in FP8; back always in BF16
    sampler_ranks: Positive  # ranks that decode together in tensor parallelism; 1: each for itself
    prompt_tokens: Positive  # mean length of prompts in reinforcement
    completion_share: Efficiency  # mean length of completions, as a share of stage.sampling.max_tokens
    mfu: Efficiency | None  # reckon with this share of the BF16 peak alone; null: with all parts of a step
    phases: list[PhaseConfig]  # empty: the stage's own steps


def cluster_rules(cluster: ClusterConfig) -> Rules:
    if cluster.devices > cluster.devices_per_node and cluster.devices % cluster.devices_per_node:
        yield f"{cluster.devices=} must be a multiple of {cluster.devices_per_node=}"
    if cluster.reserved_gb >= cluster.memory_gb:
        yield f"{cluster.reserved_gb=:g} leaves nothing of {cluster.memory_gb=:g}"


def layout_rules(layout: LayoutConfig, cluster: ClusterConfig, model: ModelConfig) -> Rules:
    """The rules in an order in which each can rely on those before it."""
    if cluster.devices % layout.pipeline:
        yield f"{layout.pipeline=} must divide {cluster.devices=}"
        return
    ranks = cluster.devices // layout.pipeline
    if ranks % layout.expert_parallel:
        yield (
            f"{layout.expert_parallel=} must divide the {ranks} ranks beside each other in the pipeline "
            f"(cluster.devices={cluster.devices} over layout.pipeline={layout.pipeline})"
        )
    if cluster.devices % layout.sampler_ranks:
        yield f"{layout.sampler_ranks=} must divide {cluster.devices=}"
    if layout.precision == "fp8" and cluster.fp8_tflops is None:
        yield f"layout.precision=fp8: cluster={cluster.name} has no FP8; set layout.precision=bf16"
    for phase in layout.phases:
        if ranks % phase.context_parallel:
            yield f"layout.phases: context_parallel={phase.context_parallel} must divide those {ranks} ranks"
    yield from pipeline_rules(layout, model)
    if model.n_routed_experts % layout.expert_parallel:
        yield f"{layout.expert_parallel=} must divide {model.n_routed_experts=}"


def pipeline_rules(layout: LayoutConfig, model: ModelConfig) -> Rules:
    if layout.schedule == "dualpipe" and layout.pipeline % 2 and layout.pipeline > 1:
        yield f"layout.schedule=dualpipe needs an even {layout.pipeline=}"
    if layout.virtual_stages > 1 and layout.schedule != "1f1b":
        yield f"{layout.virtual_stages=} is for layout.schedule=1f1b"
    if layout.pipeline > 1 and layout.zero_level > 1:
        yield f"{layout.zero_level=} with {layout.pipeline=}: a pipeline goes with ZeRO level 1 at most"
    if layout.pipeline * layout.virtual_stages > model.num_hidden_layers:
        yield f"{layout.pipeline=} x {layout.virtual_stages=} is more than {model.num_hidden_layers=}"


def planning(overrides: list[str], model: ModelConfig) -> tuple[ClusterConfig, LayoutConfig]:
    """The cluster and the layout that overrides of theirs describe; `check_layout` says whether they fit.

    A model that has a file in conf/plan/ is laid out by it. Raises ConfigError.
    """
    name = model.name if model.name in options("plan") else "default"
    return cluster_named(overrides), layout_named(overrides, name, {})


def layout_named(overrides: list[str], name: str, below: dict[str, Any]) -> LayoutConfig:
    """The layout that `layout=NAME` (else `name`) and keys below it describe, over `below` over its file."""
    return build(LayoutConfig, chosen("layout", overrides, name, below), "layout")


def check_layout(layout: LayoutConfig, cluster: ClusterConfig, model: ModelConfig) -> None:
    """Raises ConfigError on the first rule of a layout on a cluster that does not hold."""
    check_all(layout_rules(layout, cluster, model))


def cluster_named(overrides: list[str]) -> ClusterConfig:
    """The cluster that `cluster=NAME` and keys below it describe. Raises ConfigError."""
    cluster = build(ClusterConfig, chosen("cluster", overrides, None, {}), "cluster")
    check_all(cluster_rules(cluster))
    return cluster


def chosen(
    group: str, overrides: list[str], name: str | None, below: dict[str, Any], folder: str | None = None
) -> dict[str, Any]:
    """The file of a group that overrides choose (else `name`), with the values that they give over `below`.

    `folder`: of conf/; None: that of GROUPS. Overrides of other groups are left alone. Raises ConfigError.
    """
    from r1pipe.config.overrides import parse_one  # Hydra is imported when overrides are read

    values: dict[str, Any] = {}
    for override in map(parse_one, overrides):
        own, _, key = str(override.key_or_group).partition(".")
        if own != group:
            continue
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: give one value, as in {group}.KEY=VALUE")
        if key:
            values[key] = override.value()
        else:
            name = str(override.value())
    folder = folder or GROUPS[group]
    known = options(folder)
    if name is None:
        raise ConfigError(f"which {group}? give {group}=NAME; known: {', '.join(known)}")
    if name not in known:
        raise ConfigError(f"{group}={name}: no such {group}; {nearest(name, known)}")
    content = read(f"{folder}/{name}")
    parts = [item.partition("@")[0] for item in content.get("defaults", ()) if item != "_self_"]
    for part in parts:  # shared values, as those of conf/stage/part
        content = read(f"{folder}/{part}") | content
    content = {key: value for key, value in content.items() if key != "defaults"}
    return content | below | values
