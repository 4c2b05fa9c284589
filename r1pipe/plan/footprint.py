"""What a run's models take, in weights and bytes, and its checkpoints on the disk, beside what is free there.

No torch: it is asked before a job starts.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from r1pipe.config import EngineConfig, EvaluateConfig, ModelConfig, RewardModelConfig, RLConfig, RunConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.runs.machine import existing
from r1pipe.runs.reward_model_quality import KINDS

MEBIBYTE = 2**20
FULL, HALF = 4, 2  # bytes of a number
SPARE = 64 * MEBIBYTE  # for what is small: tokenizer, rollouts, logs


def check_disk_space(config: RunConfig, run: RunFolder) -> None:
    """Raises EnvironmentProblem where the disk cannot hold the checkpoints that this run is to write yet."""
    there = len(checkpoints.steps(run.checkpoints))
    needed, free = room(config, there)
    if free < needed:
        size = checkpoint_bytes(config) // MEBIBYTE
        raise EnvironmentProblem(
            f"{Path(config.root)} has {free // MEBIBYTE:,} MiB free, but checkpoints need up to "
            f"{needed // MEBIBYTE:,} MiB ({to_write(config, there)} of {size:,} MiB); free some, give "
            "root=DIR on another disk, or lower stage.keep"
        )


def room(config: RunConfig, there: int = 0) -> tuple[int, int]:
    """Bytes that the run's checkpoints need at most, beside those that are `there`, and bytes free."""
    needed = checkpoint_bytes(config) * to_write(config, there) + SPARE
    return needed, shutil.disk_usage(existing(Path(config.root))).free


def to_write(config: RunConfig, there: int = 0) -> int:
    """Checkpoints that lie on the disk at one time beside those that are there: a new one is written before
    the oldest goes."""
    if isinstance(config.stage, EvaluateConfig):
        return 1
    at_once = config.stage.keep + (config.stage.keep_best is not None) + 1
    return max(1, at_once - there)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: what it publishes, and what each engine needs for resume.

    DeepSpeed writes the weights again below ZeRO's level 3; there only those that are frozen.
    """
    engine, stage, number = config.engine, config.stage, weight_bytes(config.engine)
    size = number * published(config)
    for weights, trained in engines(config):
        again = weights if engine.zero_level < 3 else weights - trained
        size += again * number + trained * optimizer_bytes(engine)
    if isinstance(stage, RLConfig) and stage.kl_coef and 0 < stage.reference_every <= stage.max_steps:
        size += number * without_mtp(config.model)  # the reference is no longer what the run began from
    if isinstance(stage, EvaluateConfig):
        return FULL * published(config)  # a copy of its parent's, whose type is not known here
    return size


def published(config: RunConfig) -> int:
    """Weights that a checkpoint publishes; multi-token prediction names embedding and head once more."""
    model = config.model
    if isinstance(config.stage, RewardModelConfig):
        return len(KINDS) * trunk(model)
    copies = 2 * model.num_nextn_predict_layers * model.vocab_size * model.hidden_size
    return parameters(model) + copies


def engines(config: RunConfig) -> list[tuple[int, int]]:
    """(weights, those of them that are trained) of each model that the stage trains."""
    model, stage = config.model, config.stage
    if isinstance(stage, EvaluateConfig):
        return []
    if isinstance(stage, RewardModelConfig):  # one after the other
        return [(trunk(model), trunk(model))]
    if isinstance(stage, RLConfig):
        policy = parameters(model), without_mtp(model)
        return [policy, (trunk(model), trunk(model))] if stage.ppo else [policy]
    return [(parameters(model), parameters(model))]


def weight_bytes(engine: EngineConfig) -> int:
    """Bytes of a weight as the model computes with it, on disk too; FP8's rest in bfloat16."""
    return FULL if engine.precision == "fp32" else HALF


def optimizer_bytes(engine: EngineConfig) -> int:
    """Bytes of AdamW for a weight: two moments and a float32 master, which ZeRO keeps in float32 runs too."""
    moments = 2 * (FULL if engine.moments == "fp32" else HALF)
    return moments + (FULL if engine.zero_level or engine.precision != "fp32" else 0)


def without_mtp(model: ModelConfig) -> int:
    return parameters(replace(model, num_nextn_predict_layers=0))


def trunk(model: ModelConfig) -> int:
    """Weights of what reward models and PPO's value model are: no head, no multi-token prediction."""
    return without_mtp(replace(model, tie_word_embeddings=True))


def parameters(model: ModelConfig) -> int:
    """Weights of the model, embeddings and head included; norms, thousands at most, are left out."""
    d, heads = model.hidden_size, model.num_attention_heads
    query_width = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    query = d * query_width if model.q_lora_rank is None else model.q_lora_rank * (d + query_width)
    latent = d * (model.kv_lora_rank + model.qk_rope_head_dim)
    expand = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention = query + latent + expand + heads * model.v_head_dim * d
    experts = 3 * d * model.moe_intermediate_size * (model.n_routed_experts + model.n_shared_experts)
    moe = experts + d * model.n_routed_experts
    dense_layers = model.first_k_dense_replace
    moe_layers = model.num_hidden_layers - dense_layers
    embeddings = model.vocab_size * d * (1 if model.tie_word_embeddings else 2)
    dense = 3 * d * model.intermediate_size
    further = model.num_nextn_predict_layers * (attention + moe + 2 * d * d)
    return (
        embeddings + model.num_hidden_layers * attention + dense_layers * dense + moe_layers * moe + further
    )
