"""What a stage's own config says to the planner: its steps, and how the engine would spread it."""

import math
from itertools import pairwise
from typing import Any

from r1pipe.config import FineTuneConfig, PretrainConfig, RLConfig, RunConfig
from r1pipe.config.planning import ClusterConfig, LayoutConfig, PhaseConfig
from r1pipe.core.errors import ConfigError
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


def phase_of(config: RunConfig, layout: LayoutConfig) -> Phase:
    """The stage's own steps. Raises ConfigError where they cannot be planned."""
    stage = config.stage
    if not isinstance(stage, PretrainConfig | FineTuneConfig | RLConfig):
        raise ConfigError(
            f"stage={stage.name} cannot be planned; choose pretrain, an SFT or a stage of reinforcement"
        )
    if stage.max_steps == 0:
        raise ConfigError(
            f"stage.max_steps=0: how long stage={stage.name} is depends on its data; give stage.max_steps=N"
        )
    if not isinstance(stage, RLConfig):
        tokens = float(stage.max_steps * stage.batch_size * stage.sequence_length)
        return Phase(PhaseConfig(stage.name, tokens, stage.sequence_length, stage.batch_size, 1))
    if stage.ppo is not None:
        raise ConfigError("stage.algorithm=ppo cannot be planned yet, for its value model; choose grpo")
    longest = min(stage.sampling.max_tokens, config.model.max_position_embeddings)
    mean = max(1, round(longest * layout.completion_share))
    completions = stage.prompts_per_step * stage.group_size
    batch, steps = completions // stage.minibatches, stage.minibatches * stage.inner_epochs
    rollout = Rollout(
        prompts=stage.prompts_per_step,
        prompt=layout.prompt_tokens,
        completions=completions,
        mean=mean,
        steps=steps,
        epochs=stage.inner_epochs,
        longest=longest,
        largest_pass=max(stage.max_tokens_per_micro_batch, longest),
        slots=stage.sampling.max_num_seqs,
        reference=stage.kl_coef > 0,
        judges=len(KINDS) * (stage.preference is not None),
        server=_server(config),
    )
    row = layout.prompt_tokens + mean
    tokens = float(stage.max_steps * steps * batch * row)
    return Phase(PhaseConfig(stage.name, tokens, row, batch, 1), rollout)
