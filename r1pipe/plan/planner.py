"""A training on a cluster, before anything is spent: does it fit, how long, what it costs (`r1pipe plan`)."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from r1pipe.config import ModelConfig
from r1pipe.config.planning import ClusterConfig, LayoutConfig, PhaseConfig, layout_rules
from r1pipe.core.errors import ConfigError
from r1pipe.plan import duration, sizes
from r1pipe.plan.duration import Seconds
from r1pipe.plan.memory import GIGA, Held, Memory, Rollout, memory
from r1pipe.plan.sampling import rollout_step
from r1pipe.plan.work import work

HOUR = 3600.0
LANGUAGES = (
    0.1e9  # bytes of language identification in a process: py3langid's automaton, 75 to 118 MB measured
)


@dataclass(frozen=True)
class Phase:
    """Optimizer steps that are alike."""

    config: PhaseConfig
    rollout: Rollout | None = None
    longest: int = 0  # tokens of the longest row; 0: all are alike
    largest_pass: int = 0  # tokens of the largest micro-batch; 0: the layout's rows
    head: bool = True  # false: of a reward model, which has no logits
    beside: float = 0.0  # bytes of whole weights that are only read, which ZeRO level 3 shares
    before: float = 0.0  # bytes of a rank for whoever answers before training begins
    scores_language: bool = False  # of completions, on the rank's own cores

    @property
    def steps(self) -> int:
        return math.ceil(self.config.tokens / self.config.sequence_length / self.config.batch_size)


@dataclass(frozen=True)
class Planned:
    """A phase, planned."""

    phase: Phase
    step: Seconds
    memory: Memory
    devices: int
    flops: float  # the model's of a step: three times those of a forward pass
    peak: float  # FLOPs a second of all devices in BF16

    @property
    def hours(self) -> float:
        """Device hours."""
        return self.step.total * self.phase.steps * self.devices / HOUR

    @property
    def tokens_per_device(self) -> float:
        """A second."""
        config = self.phase.config
        return config.batch_size * config.sequence_length / self.step.total / self.devices

    @property
    def mfu(self) -> float:
        return self.flops / self.step.total / self.peak

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.phase.config),
            "steps": self.phase.steps,
            "step_s": self.step.total,
            "seconds": self.step.parts(),
            "tokens_per_s_per_device": self.tokens_per_device,
            "mfu": self.mfu,
            "gpu_hours": self.hours,
            "memory_gb": self.memory.total / GIGA,
            "memory_gb_by_part": self.memory.gigabytes(),
        }


@dataclass(frozen=True)
class Plan:
    """All phases of a training on a cluster in one layout."""

    model: str
    cluster: ClusterConfig
    layout: LayoutConfig
    phases: list[Planned]

    @property
    def hours(self) -> dict[str, float]:
        """Device hours by name, and `total`."""
        by_name: dict[str, float] = {}
        for planned in self.phases:
            name = planned.phase.config.name
            by_name[name] = by_name.get(name, 0.0) + planned.hours
        return {**by_name, "total": sum(by_name.values())}

    @property
    def usd(self) -> float:
        return self.hours["total"] * self.cluster.usd_per_hour

    @property
    def memory_gb(self) -> float:
        """Of the rank that needs most."""
        return max(planned.memory.total for planned in self.phases) / GIGA

    @property
    def fits(self) -> bool:
        return self.memory_gb <= self.cluster.memory_gb

    def as_json(self) -> dict[str, Any]:
        layout = asdict(self.layout)
        layout.pop("phases")
        return {
            "model": self.model,
            "cluster": asdict(self.cluster),
            "layout": layout,
            "gpu_hours": self.hours,
            "usd": self.usd,
            "kwh": self.hours["total"] * self.cluster.watts / 1000,
            "fits": self.fits,
            "memory_gb": self.memory_gb,
            "phases": [planned.as_json() for planned in self.phases],
        }


def plan(model: ModelConfig, cluster: ClusterConfig, layout: LayoutConfig, phases: list[Phase]) -> Plan:
    return Plan(model.name, cluster, layout, [planned(model, cluster, layout, phase) for phase in phases])


def planned(model: ModelConfig, cluster: ClusterConfig, layout: LayoutConfig, phase: Phase) -> Planned:
    config, rollout = phase.config, phase.rollout
    if not phase.head:
        model = replace(model, tie_word_embeddings=True, num_nextn_predict_layers=0)
    pipelines = cluster.devices // layout.pipeline
    tokens = layout.micro_batch * config.sequence_length // config.context_parallel
    micro_batches = math.ceil(config.batch_size * config.context_parallel / pipelines / layout.micro_batch)
    counted = work(model, layout, cluster, config.sequence_length, config.context_parallel)
    states = Held.of(model, layout, cluster)
    step = duration.training_step(counted, states, layout, cluster, tokens, micro_batches)
    if rollout is not None:
        passed = tokens * micro_batches / layout.pipeline / rollout.epochs
        step = step.plus(rollout_step(model, cluster, layout, rollout, passed))
    flops = 3 * counted.forward * config.batch_size * config.sequence_length
    return Planned(
        phase,
        step,
        held_by(model, cluster, layout, phase, tokens, micro_batches),
        cluster.devices,
        flops,
        cluster.devices * cluster.bf16_tflops * duration.TERA,
    )


def held_by(
    model: ModelConfig,
    cluster: ClusterConfig,
    layout: LayoutConfig,
    phase: Phase,
    tokens: int,
    micro_batches: int,
) -> Memory:
    """Memory of the rank that needs most; `tokens` of a micro-batch of mean rows."""
    rows = math.ceil(phase.config.batch_size / (cluster.devices // layout.pipeline))
    longest = phase.longest or phase.config.sequence_length // phase.config.context_parallel
    tokens = max(tokens, min(phase.largest_pass, rows * longest))
    held = memory(model, layout, cluster, tokens, micro_batches, phase.rollout, longest)
    among = cluster.devices if layout.zero_level == 3 else 1
    held = replace(
        held,
        logits=held.logits if phase.head else 0.0,
        frozen=held.frozen + phase.beside / among,
        before=phase.before,
    )
    if cluster.unit == "core":
        kept = kept_by_heap(held, cluster.fused) + LANGUAGES * phase.scores_language
        held = replace(held, buffers=held.buffers + kept)
    return held


def kept_by_heap(held: Memory, fused: bool) -> float:
    """Bytes that the C library keeps of what was freed: training finds what sampling left, or the other way
    round. torch's operators, which make and free many parts of different sizes, leave holes: as much again as
    a pass has stored (docs/lab-notes.md, 2026-11-30)."""
    trained = held.activations + held.logits
    return min(trained, held.sampler + held.cache + held.before) if fused else trained


def search(
    model: ModelConfig, cluster: ClusterConfig, layout: LayoutConfig, phases: list[Phase]
) -> list[Plan]:
    """Plans of all layouts that fit, fastest first. Raises ConfigError where none does."""
    plans = [plan(model, cluster, one, phases) for one in layouts(model, cluster, layout)]
    if not plans:
        reason = next(layout_rules(replace(layout, pipeline=1, expert_parallel=1), cluster, model))
        raise ConfigError(f"no layout is possible on cluster={cluster.name}: {reason}")
    fitting = sorted((one for one in plans if one.fits), key=lambda one: one.hours["total"])
    if not fitting:
        least = min(plans, key=lambda one: one.memory_gb)
        raise ConfigError(
            f"none of {len(plans)} layouts fits cluster={cluster.name}: the least is {least.memory_gb:,.0f} "
            f"of {cluster.memory_gb:g} GB a device; give more devices (cluster.devices=N)"
        )
    return fitting


def layouts(model: ModelConfig, cluster: ClusterConfig, layout: LayoutConfig) -> Iterator[LayoutConfig]:
    """What `search` tries: ZeRO levels, expert and pipeline parallelism, micro-batches, recomputation."""
    powers = [2**power for power in range(cluster.devices.bit_length())]
    levels: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    recomputing: tuple[sizes.Recompute, ...] = ("none", "selective", "full")
    for level, experts, ranks, rows, recompute in product(levels, powers, powers, (1, 2, 4), recomputing):
        one = replace(
            layout,
            zero_level=level,
            expert_parallel=experts,
            pipeline=ranks,
            micro_batch=rows,
            recompute=recompute,
            virtual_stages=layout.virtual_stages if ranks > 1 else 1,
        )
        if not any(layout_rules(one, cluster, model)):
            yield one
