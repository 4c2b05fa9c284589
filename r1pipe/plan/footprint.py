"""Estimates of a run's memory and disk space, before it starts."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from r1pipe.config import (
    EngineConfig,
    EvaluateConfig,
    HFConfig,
    ModelConfig,
    RewardModelConfig,
    RLConfig,
    RunConfig,
)
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints, machine
from r1pipe.runs.reward_model_quality import KINDS

MEBIBYTE = 2**20
FULL, HALF = 4, 2  # bytes of float32 and of bfloat16
TOKEN = 12  # bytes of a drawn token and its log-probability in a checkpoint
SPARE = 64 * MEBIBYTE  # for small files: tokenizer, rollouts, logs
LOGITS_IN_MEMORY = 2**25  # elements of [N, V] in memory at once (r1pipe.model.logprobs)
LOGIT_COPIES = 3  # logits, their float32 softmax, and its gradient


@dataclass(frozen=True)
class Need:
    """Memory of one rank, in bytes."""

    states: float  # of all models: weights, master weights, gradients, moments
    activations: float  # of the largest training pass
    logits: float
    cache: float  # of the sampler

    @property
    def peak(self) -> float:
        """Training and sampling alternate."""
        return self.states + max(self.activations + self.logits, self.cache)

    def parts(self) -> str:
        """The parts in MiB, for messages."""
        sizes = {"states": self.states, "activations": self.activations, "logits": self.logits}
        sizes |= {"cache": self.cache} if self.cache else {}
        return ", ".join(f"{part} {mib(size)}" for part, size in sizes.items())


def estimates(config: RunConfig) -> dict[str, str]:
    """The run's needs of memory and disk space, for messages."""
    needs = {}
    if not isinstance(config.stage, EvaluateConfig):
        need = needed(config, config.model.max_position_embeddings)
        needs["memory"] = f"about {mib(need.peak)} MiB a rank ({need.parts()})"
    return {**needs, "disk": disk(config)}


def disk(config: RunConfig) -> str:
    """The largest size of the run's checkpoints, for messages."""
    size, (at_most, free) = checkpoint_bytes(config), disk_space(config)
    return (
        f"{to_write(config)} checkpoints of {mib(size)} MiB: with {mib(SPARE)} for the rest up to "
        f"{mib(at_most)} of {mib(free)} MiB in {Path(config.root)}"
    )


def mib(size: float) -> str:
    return f"{size / MEBIBYTE:,.0f}"


def check_disk_space(config: RunConfig, run: RunFolder) -> None:
    """Raises EnvironmentProblem if the disk has no room for the checkpoints yet to be written."""
    existing = len(checkpoints.steps(run.checkpoints))
    needed, free = disk_space(config, existing)
    if free < needed:
        size = checkpoint_bytes(config) // MEBIBYTE
        raise EnvironmentProblem(
            f"{Path(config.root)} has {free // MEBIBYTE:,} MiB free, but checkpoints need up to "
            f"{needed // MEBIBYTE:,} MiB ({to_write(config, existing)} of {size:,} MiB); free some, give "
            "root=DIR on another disk, or lower stage.keep"
        )


def disk_space(config: RunConfig, existing: int = 0) -> tuple[int, int]:
    """Bytes that the run needs at most beside its `existing` checkpoints, and bytes free."""
    needed = checkpoint_bytes(config) * to_write(config, existing) + SPARE
    return needed, shutil.disk_usage(machine.existing(Path(config.root))).free


def to_write(config: RunConfig, existing: int = 0) -> int:
    """Most checkpoints on the disk at one time beside the `existing` ones: a new one is written before the
    oldest is removed."""
    if isinstance(config.stage, EvaluateConfig):
        return 1
    at_once = config.stage.keep + (config.stage.keep_best is not None) + 1
    return max(1, at_once - existing)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: its published files, and each engine's state for resume.

    DeepSpeed writes the weights a second time below ZeRO level 3; at level 3 only the frozen ones. Beside
    adapters the frozen ones are left out: they are the parent's.
    """
    engine, stage, model, number = config.engine, config.stage, config.model, weight_bytes(config.engine)
    if isinstance(stage, RewardModelConfig):
        published = len(KINDS) * trunk(model)
    else:  # multi-token prediction stores embedding and head a second time
        layers = 0 if isinstance(model, HFConfig) else model.num_nextn_predict_layers
        published = parameters(model) + adapters(model) + 2 * layers * model.vocab_size * model.hidden_size
    if isinstance(stage, EvaluateConfig):
        return FULL * published  # a copy of its parent's, whose dtype is not known here
    size = number * published
    for weights, trained in engines(config):
        if adapters(model):
            again = trained if engine.zero_level < 3 else 0
        else:
            again = weights if engine.zero_level < 3 else weights - trained
        size += again * number + trained * optimizer_bytes(engine)
    if isinstance(stage, RLConfig) and stage.kl_coef and 0 < stage.reference_every <= stage.max_steps:
        # the reference is updated during the run
        size += number * (adapters(model) or without_mtp(model))
    if isinstance(stage, RLConfig):  # completions that wait for their step, at their longest
        completions = engine.async_steps * stage.prompts_per_step * stage.group_size
        size += TOKEN * completions * stage.sampling.max_tokens
    return size


def engines(config: RunConfig) -> list[tuple[int, int]]:
    """(weights, trained weights) of each model that the stage trains; with adapters they alone."""
    model, stage = config.model, config.stage
    if isinstance(stage, EvaluateConfig):
        return []
    added = adapters(model)
    of_trunk = trunk(model) + added, added or trunk(model)
    if isinstance(stage, RewardModelConfig):  # one model after the other
        return [of_trunk]
    if isinstance(stage, RLConfig):
        policy = parameters(model) + added, added or without_mtp(model)
        return [policy, of_trunk] if stage.ppo else [policy]
    return [(parameters(model) + added, added or parameters(model))]


def adapters(model: ModelConfig | HFConfig) -> int:
    """Number of weights of the adapters; 0 where all weights are trained."""
    return (model.lora.parameters or 0) if isinstance(model, HFConfig) else 0


def weight_bytes(engine: EngineConfig) -> int:
    """Bytes of a weight in memory and on disk; with FP8, weights are stored in bfloat16."""
    return FULL if engine.precision == "fp32" else HALF


def optimizer_bytes(engine: EngineConfig) -> int:
    """Bytes of AdamW for a weight: two moments and a float32 master, which ZeRO keeps in fp32 runs, too."""
    moments = 2 * (FULL if engine.moments == "fp32" else HALF)
    return moments + (FULL if engine.zero_level or engine.precision != "fp32" else 0)


def without_mtp(model: ModelConfig | HFConfig) -> int:
    if isinstance(model, HFConfig):
        return model.parameters
    return parameters(replace(model, num_nextn_predict_layers=0))


def trunk(model: ModelConfig | HFConfig) -> int:
    """Number of weights of a reward model or PPO's value model: no LM head, no multi-token prediction."""
    if isinstance(model, HFConfig):
        return model.parameters  # whether the head is tied is not known here
    return without_mtp(replace(model, tie_word_embeddings=True))


def needed(config: RunConfig, prompt: int) -> Need:
    """Memory of a rank; `prompt`: tokens of the longest prompt. Python and torch take another half GiB.

    For two GRPO updates of conf/model/small on a CPU (float32, 8,192 tokens a pass) it is 13 to 63% too high.
    """
    model, engine, stage = config.model, config.engine, config.stage
    number, context = weight_bytes(engine), model.max_position_embeddings
    if isinstance(stage, RLConfig):  # tokens of the largest training pass
        tokens = max(stage.max_tokens_per_micro_batch, min(stage.sampling.max_tokens, context))
    else:
        length = getattr(stage, "sequence_length", 2 * context)  # a reward model reads pairs
        rows = -(-getattr(stage, "batch_size") // (engine.ranks * engine.gradient_accumulation))  # noqa: B009
        tokens = rows * length
    at_once = min(tokens, max(1, LOGITS_IN_MEMORY // model.vocab_size))
    head = at_once * model.vocab_size * FULL * LOGIT_COPIES
    kept = stored(model, engine.recompute)
    cache = 0.0
    if isinstance(stage, RLConfig):
        completions = -(-stage.prompts_per_step * stage.group_size // engine.ranks)
        length = min(prompt + stage.sampling.max_tokens, context)
        slots = min(stage.sampling.max_num_seqs, completions)
        entry = (
            model.cache_width if isinstance(model, HFConfig) else model.kv_lora_rank + model.qk_rope_head_dim
        )
        cache = slots * length * model.num_hidden_layers * entry * number
    return Need(states(config), tokens * number * kept, head, cache)


def stored(model: ModelConfig | HFConfig, recompute: bool) -> int:
    """Elements that all layers store of a token for the backward pass: inputs of norms, products and SwiGLU.

    For a model of transformers as if its layers were dense, with one set of projections.
    """
    if isinstance(model, HFConfig):
        layer = 8 * model.hidden_size + 2 * model.cache_width + 3 * model.intermediate_size
        layers = model.num_hidden_layers
        return layers * model.hidden_size + 2 * layer if recompute else layers * layer
    d, heads, layers = model.hidden_size, model.num_attention_heads, model.num_hidden_layers
    key = model.qk_nope_head_dim + model.qk_rope_head_dim
    attention = 4 * d + heads * (2 * key + 2 * model.v_head_dim) + (model.q_lora_rank or 0)
    attention += model.kv_lora_rank + model.qk_rope_head_dim
    experts = model.num_experts_per_tok + model.n_shared_experts
    dense = attention + 3 * model.intermediate_size
    moe = attention + experts * (3 * model.moe_intermediate_size + 2 * d) + model.n_routed_experts
    kept = model.first_k_dense_replace * dense + (layers - model.first_k_dense_replace) * moe
    if recompute:  # each layer's input, and one layer with the gradients of what it keeps
        kept = layers * d + 2 * max(dense, moe)
    return kept


def states(config: RunConfig) -> float:
    """Bytes of a rank for engines, reference and reward models; ZeRO partitions within a machine."""
    engine, stage, ranks = config.engine, config.stage, config.engine.ranks
    number = weight_bytes(engine)
    samples = isinstance(stage, RLConfig)
    each = optimizer_bytes(engine) / (ranks if engine.zero_level >= 1 else 1)
    each += FULL / (ranks if engine.zero_level >= 2 else 1)  # gradients
    # to sample, every rank gathers a whole model
    shared = ranks if engine.zero_level >= 3 and not samples else 1
    total = sum(trained * each + weights * number / shared for weights, trained in engines(config))
    if isinstance(stage, RLConfig):
        copied = stage.kl_coef > 0 and not adapters(
            config.model
        )  # with adapters it is the policy without them
        total += number * without_mtp(config.model) * copied
        total += number * trunk(config.model) * len(KINDS) * (stage.preference is not None)
    return total


def parameters(model: ModelConfig | HFConfig) -> int:
    """Number of weights, embeddings and head included; without norms (thousands at most)."""
    if isinstance(model, HFConfig):
        return model.parameters
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
