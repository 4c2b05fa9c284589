"""What a stage's own config says to the planner: its steps, and how the engine would spread it."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

from r1pipe.config import (
    FineTuneConfig,
    PretrainConfig,
    RejectionConfig,
    RewardModelConfig,
    RLConfig,
    RunConfig,
)
from r1pipe.config.planning import ClusterConfig, LayoutConfig, PhaseConfig
from r1pipe.config.rl import ReinforcementConfig
from r1pipe.config.transfer import TransferConfig
from r1pipe.core.errors import ConfigError
from r1pipe.plan import answerers
from r1pipe.plan.memory import Rollout
from r1pipe.plan.planner import Phase
from r1pipe.plan.sizes import recomputation
from r1pipe.runs.reward_model_quality import KINDS

TENSOR_PARALLEL = ("--tensor-parallel-size", "--tensor_parallel_size", "-tp")  # vLLM's argument


def of_engine(config: RunConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Values of a layout that the run's engine and stage have, on all devices of the cluster."""
    engine, stage = config.engine, config.stage
    values: dict[str, Any] = {
        "precision": engine.precision,
        "zero_level": engine.zero_level,
        "expert_parallel": engine.expert_parallel,
        "pipeline": engine.pipeline,
        "schedule": engine.schedule,
        "moments": engine.moments,
        "recompute": recomputation(engine),
        "sampler_ranks": _decoding_together(config),
    }
    if isinstance(stage, PretrainConfig | FineTuneConfig):  # all rows of a rank at once
        rows = math.ceil(stage.batch_size / cluster.devices / engine.gradient_accumulation)
        values["micro_batch"] = rows
    return values


def _decoding_together(config: RunConfig) -> int:
    """The tensor parallelism of a vLLM server that the run starts. One that runs already may have another:
    layout.sampler_ranks. Raises ConfigError where it is no number."""
    words = " ".join(config.sampler.args if config.engine.sampler == "vllm" else ()).replace("=", " ").split()
    ranks = [after for word, after in pairwise(words) if word in TENSOR_PARALLEL]
    if ranks and not ranks[-1].isdigit():
        raise ConfigError(f"sampler.args: {TENSOR_PARALLEL[0]} is {ranks[-1]}; give a number of GPUs")
    return int(ranks[-1]) if ranks else 1


def _server(config: RunConfig) -> float | None:
    """Share of the trainer's devices that a vLLM server takes; None without one."""
    if config.engine.sampler != "vllm":
        return None
    here = config.sampler.url is None and config.sampler.gpus is None
    return config.sampler.gpu_memory_utilization if here else 0.0


def phases_of(config: RunConfig, layout: LayoutConfig, cluster: ClusterConfig) -> list[Phase]:
    """The stage's own steps. Raises ConfigError where they cannot be planned."""
    stage = config.stage
    if isinstance(stage, RewardModelConfig):
        found = _reward_models(config, stage, layout, cluster)
    elif isinstance(stage, PretrainConfig | FineTuneConfig | RLConfig):
        if stage.max_steps == 0:
            raise ConfigError(
                f"stage.max_steps=0: how long stage={stage.name} is depends on its data; "
                "give stage.max_steps=N"
            )
        taught = stage.rl if isinstance(stage, TransferConfig) else None
        if isinstance(stage, RLConfig):
            found = [_reinforced(config, stage, layout)]
        else:
            found = [_reinforced(config, taught, layout) if taught else _tuned(config, stage)]
    else:
        raise ConfigError(
            f"stage={stage.name} cannot be planned: it trains nothing; choose a stage that does"
        )
    beside, before = answerers.beside(config), answerers.before(config, layout.prompt_tokens)
    return [replace(phase, beside=beside, before=before) for phase in found]


def _tuned(config: RunConfig, stage: PretrainConfig | FineTuneConfig) -> Phase:
    tokens = float(stage.max_steps * stage.batch_size * stage.sequence_length)
    steps = PhaseConfig(stage.name, tokens, stage.sequence_length, stage.batch_size, 1)
    filters = isinstance(stage, RejectionConfig) or config.teacher is not None  # what it has sampled
    return Phase(steps, scores_language=filters)


def _reward_models(
    config: RunConfig, stage: RewardModelConfig, layout: LayoutConfig, cluster: ClusterConfig
) -> list[Phase]:
    """One model after the other: of pairs, and of labelled responses. In memory rows are at their longest."""
    context, found = config.model.max_position_embeddings, list[Phase]()
    row = min(context, layout.prompt_tokens + max(1, round(context * layout.completion_share)))
    for kind, examples, rows in zip(KINDS, (stage.pairs, stage.labels), (2, 1), strict=True):
        steps = stage.epochs * (examples // stage.batch_size)
        steps = min(steps, stage.max_steps) if stage.max_steps else steps
        batch = rows * stage.batch_size
        at_once = math.ceil(stage.batch_size / cluster.devices / config.engine.gradient_accumulation)
        largest = min(max(rows * context, stage.max_tokens_per_micro_batch), at_once * rows * context)
        one = PhaseConfig(f"{stage.name} {kind}", float(max(1, steps) * batch * row), row, batch, 1)
        found.append(Phase(one, longest=context, largest_pass=largest, head=False))
    return found


def _reinforced(config: RunConfig, learning: ReinforcementConfig, layout: LayoutConfig) -> Phase:
    if learning.ppo is not None:
        raise ConfigError("stage.algorithm=ppo cannot be planned yet, for its value model; choose grpo")
    longest = min(learning.sampling.max_tokens, config.model.max_position_embeddings)
    mean = max(1, round(longest * layout.completion_share))
    completions = learning.prompts_per_step * learning.group_size
    batch, steps = completions // learning.minibatches, learning.minibatches * learning.inner_epochs
    rollout = Rollout(
        prompts=learning.prompts_per_step,
        prompt=layout.prompt_tokens,
        completions=completions,
        mean=mean,
        steps=steps,
        epochs=learning.inner_epochs,
        longest=longest,
        slots=learning.sampling.max_num_seqs,
        reference=learning.kl_coef > 0,
        judges=len(KINDS) * (learning.preference is not None),
        server=_server(config),
    )
    row = layout.prompt_tokens + mean
    tokens = float(config.stage.max_steps * steps * batch * row)
    return Phase(
        PhaseConfig(config.stage.name, tokens, row, batch, 1),
        rollout,
        longest=layout.prompt_tokens + longest,
        largest_pass=max(learning.max_tokens_per_micro_batch, longest),
        scores_language=True,
    )
