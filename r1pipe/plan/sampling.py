"""How long a rollout takes to sample: a token after another, so reading weights and latencies count."""

import math
from dataclasses import replace

from r1pipe.config import ModelConfig
from r1pipe.config.planning import ClusterConfig, LayoutConfig
from r1pipe.plan import sizes
from r1pipe.plan.duration import TERA, Seconds, bandwidth, link, of_tokens
from r1pipe.plan.memory import Rollout
from r1pipe.plan.work import Work, crosses, work

MICRO = 1e-6


def rollout_step(
    model: ModelConfig, cluster: ClusterConfig, layout: LayoutConfig, rollout: Rollout, passed: float
) -> Seconds:
    """An optimizer step's share of sampling, and the reference's pass over `passed` tokens of a rank."""
    whole = replace(model, num_nextn_predict_layers=0)
    counted = work(whole, layout, cluster, rollout.prompt + rollout.mean)
    forward = Seconds().plus(of_tokens(counted, layout, cluster, backward=False), 1 / cluster.sustained)
    together = layout.sampler_ranks
    groups = cluster.devices // together
    rows, cached = rollout.rows(groups), rollout.prompt + rollout.mean / 2
    rounds = math.ceil(rollout.completions / groups / rows)
    decoded = (rounds - 1) * rollout.mean + rollout.longest
    sampling = decoded * decoding(whole, counted, cached, rows, layout, cluster)
    # a prompt is read once for its whole group
    sampling += math.ceil(rollout.prompts / groups) * rollout.prompt * forward.total / together
    scored = passed if rollout.reference else 0.0
    waited = refit(whole, layout, cluster, rollout)
    own = Seconds(sampling=sampling / rollout.steps, refit=waited / rollout.steps)
    return own.plus(forward, scored)


def refit(model: ModelConfig, layout: LayoutConfig, cluster: ClusterConfig, rollout: Rollout) -> float:
    """Seconds until the sampler has the new weights: all of them pass through one device's link, of rank 0
    that gathers them for a server, or of each rank that gathers them to sample by itself at ZeRO level 3.

    So they do in NeMo-RL, where each rank gathers the model for the sampler on its GPU: for DeepSeek-V3 about
    35 s by its author (NVIDIA-NeMo/RL#1267), 30.4 s by this formula.
    """
    if rollout.server is None and layout.zero_level < 3:
        return 0.0
    elsewhere = sizes.parameters(model) * (1 - 1 / cluster.devices)
    moved = sizes.weight_bytes(layout.precision) * elsewhere
    return moved / link(cluster, crosses(cluster.devices, cluster))


def decoding(
    model: ModelConfig, token: Work, cached: float, rows: int, layout: LayoutConfig, cluster: ClusterConfig
) -> float:
    """Seconds to sample a further token of `rows` completions on the devices that decode together.

    `token`: the work of one; `cached`: tokens of each that are looked back on, which each device reads for
    its own heads. Products are taken as in BF16.
    """
    together, peak = layout.sampler_ranks, cluster.bf16_tflops * TERA
    products = rows * (token.low + token.high) / (peak * cluster.bf16_efficiency)
    attention = rows * token.lookup * cached / (peak * cluster.attention_efficiency)
    latents = rows * cached * model.num_hidden_layers * sizes.cache_entry(model)
    read = sizes.weight_bytes(layout.precision) * (weights_read(model, layout, rows) + latents)
    waiting = cluster.far_layer_latency_us if crosses(together, cluster) else cluster.layer_latency_us
    busy = max((products + attention) / together, read / bandwidth(cluster)) / cluster.sustained
    return busy + model.num_hidden_layers * waiting * MICRO


def weights_read(model: ModelConfig, layout: LayoutConfig, rows: int) -> float:
    """Number of weights that a device reads for a token of `rows` completions: of experts, those chosen.

    Devices that decode together share all weights, and others the experts of layout.expert_parallel.
    """
    routed = sizes.routed(model)
    meeting = rows if layout.sampler_ranks > 1 else rows * layout.expert_parallel  # in a device's experts
    missed = (1 - model.num_experts_per_tok / model.n_routed_experts) ** meeting
    others, chosen = sizes.parameters(model) - routed, routed * (1 - missed)
    if layout.sampler_ranks > 1:
        return (others + chosen) / layout.sampler_ranks
    return others + chosen / layout.expert_parallel
