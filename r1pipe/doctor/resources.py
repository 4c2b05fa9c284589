"""Memory and disk: what the run will take at most, beside what is there."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from r1pipe.config import ModelConfig, RLConfig, RunConfig, StageConfig
from r1pipe.doctor.context import Context, graded
from r1pipe.model.logprobs import LOGITS_IN_MEMORY
from r1pipe.plan import footprint
from r1pipe.runs import machine
from r1pipe.runs.findings import FAIL, PASS, Finding
from r1pipe.runs.reward_model_quality import KINDS

LOGIT_COPIES = 3  # logits, their float32 softmax, and its gradient


@dataclass(frozen=True)
class Need:
    """Bytes of one rank."""

    states: float  # weights, masters, gradients, moments (PPO: the value model's too), reference, judges
    activations: float  # of the largest training pass
    logits: float
    cache: float  # of the sampler

    @property
    def peak(self) -> float:
        """Training and sampling take turns."""
        return self.states + max(self.activations + self.logits, self.cache)


def device(context: Context, name: str) -> Finding:
    """Where the job computes; asking for it raises EnvironmentProblem where it is not there."""
    probed = f"{context.run.world_size} of {context.config.engine.ranks} ranks try it out"
    if context.device.type == "cuda":
        return Finding(name, PASS, f"{torch.cuda.get_device_name(context.device)}, {probed}")
    return Finding(name, PASS, f"{context.device.type}, {machine.cores()} cores, {probed}")


def memory(context: Context, name: str) -> Finding:
    """An estimate (what is kept, what a pass holds) beside what is free for each rank."""
    need = needed(context.config, longest_prompt(context))
    free = available(context.device, context.config.engine.ranks)
    parts = {"states": need.states, "activations": need.activations, "logits": need.logits}
    parts |= {"cache": need.cache} if need.cache else {}
    shown = f"about {mib(need.peak)} of {mib(free)} MiB a rank ("
    shown += ", ".join(f"{part} {mib(size)}" for part, size in parts.items()) + ")"
    return graded(name, need.peak / free, context.limits.memory, shown, less_of(need, context.config.stage))


def less_of(need: Need, stage: StageConfig) -> str:
    """What makes the largest part smaller."""
    if need.states > need.peak / 2:
        less = "set engine.zero_level=3 with more engine.ranks, or engine.moments=bf16"
        return f"{less}, or take stage.algorithm=grpo" if getattr(stage, "ppo", None) else less
    if need.cache > need.activations + need.logits:
        return "lower stage.sampling.max_num_seqs or stage.sampling.max_tokens"
    reinforced = isinstance(stage, RLConfig)
    smaller = "lower stage.max_tokens_per_micro_batch" if reinforced else "raise engine.gradient_accumulation"
    return f"{smaller}, or set engine.recompute=true"


def mib(size: float) -> str:
    return f"{size / footprint.MEBIBYTE:,.0f}"


def longest_prompt(context: Context) -> int:
    if not isinstance(context.config.stage, RLConfig):
        return 0
    prompts = [*context.prompts, *context.general]
    return max((len(context.chat.prompt_tokens(prompt)) for prompt in prompts), default=0)


def needed(config: RunConfig, prompt: int) -> Need:
    """What a rank takes; `prompt`: tokens of the longest.

    Beside two GRPO updates of conf/model/small on a CPU (float32, 8,192 tokens a pass) it is 13 to 63% high;
    Python and torch themselves, half a GiB, are not in it.
    """
    model, engine, stage = config.model, config.engine, config.stage
    number = footprint.weight_bytes(engine)
    tokens = tokens_of_pass(config)
    at_once = min(tokens, max(1, LOGITS_IN_MEMORY // model.vocab_size))
    head = at_once * model.vocab_size * footprint.FULL * LOGIT_COPIES
    layers = model.num_hidden_layers
    dense, moe = layer_numbers(model)
    kept = model.first_k_dense_replace * dense + (layers - model.first_k_dense_replace) * moe
    if engine.recompute:  # each layer's input, and one layer with the gradients of what it keeps
        kept = layers * model.hidden_size + 2 * max(dense, moe)
    cache = 0.0
    if isinstance(stage, RLConfig):
        slots = min(
            stage.sampling.max_num_seqs, -(-stage.prompts_per_step * stage.group_size // engine.ranks)
        )
        length = min(prompt + stage.sampling.max_tokens, model.max_position_embeddings)
        cache = slots * length * layers * (model.kv_lora_rank + model.qk_rope_head_dim) * number
    return Need(states(config), tokens * number * kept, head, cache)


def states(config: RunConfig) -> float:
    """Bytes of a rank that stay, of engines, reference and reward models: what ZeRO partitions is
    divided by the ranks of this machine alone."""
    engine, stage, ranks = config.engine, config.stage, config.engine.ranks
    number = footprint.weight_bytes(engine)
    samples = isinstance(stage, RLConfig)
    each = footprint.optimizer_bytes(engine) / (ranks if engine.zero_level >= 1 else 1)
    each += footprint.FULL / (ranks if engine.zero_level >= 2 else 1)  # gradients
    # for sampling, and for its values, every rank gathers a whole model
    shared = ranks if engine.zero_level >= 3 and not samples else 1
    total = sum(trained * each + weights * number / shared for weights, trained in footprint.engines(config))
    if isinstance(stage, RLConfig):
        total += number * footprint.without_mtp(config.model) * (stage.kl_coef > 0)
        total += number * footprint.trunk(config.model) * len(KINDS) * (stage.preference is not None)
    return total


def tokens_of_pass(config: RunConfig) -> int:
    """Tokens of the largest training pass of a rank."""
    stage, engine, context = config.stage, config.engine, config.model.max_position_embeddings
    if isinstance(stage, RLConfig):
        return max(stage.max_tokens_per_micro_batch, min(stage.sampling.max_tokens, context))
    length = getattr(stage, "sequence_length", 2 * context)  # a reward model reads pairs
    rows = -(-getattr(stage, "batch_size") // (engine.ranks * engine.gradient_accumulation))  # noqa: B009
    return rows * length


def layer_numbers(model: ModelConfig) -> tuple[int, int]:
    """Numbers that a dense and an MoE layer keep of a token for the backward pass: inputs of norms, products
    and SwiGLU."""
    d, heads = model.hidden_size, model.num_attention_heads
    key = model.qk_nope_head_dim + model.qk_rope_head_dim
    attention = 4 * d + heads * (2 * key + 2 * model.v_head_dim) + (model.q_lora_rank or 0)
    attention += model.kv_lora_rank + model.qk_rope_head_dim
    experts = model.num_experts_per_tok + model.n_shared_experts
    routed = experts * (3 * model.moe_intermediate_size + 2 * d) + model.n_routed_experts
    return attention + 3 * model.intermediate_size, attention + routed


def available(device: torch.device, ranks: int) -> float:
    """Bytes free for one rank: on its GPU, or its share of this machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available / ranks


def disk(context: Context, name: str) -> Finding:
    """Room for the checkpoints that the run keeps, where they will be written."""
    config, root = context.config, Path(context.config.root)
    needed, free = footprint.room(config)
    shown = f"{footprint.to_write(config)} checkpoints of {mib(footprint.checkpoint_bytes(config))} MiB: "
    shown += f"with {mib(footprint.SPARE)} for the rest up to {mib(needed)} of {mib(free)} MiB in {root}"
    if free < needed:
        return Finding(name, FAIL, shown, "free some, give root=DIR on another disk, or lower stage.keep")
    return Finding(name, PASS, shown)
