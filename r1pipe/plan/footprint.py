"""Estimates of a run's memory and disk space, before it starts."""

import shutil
from collections.abc import Sequence
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
from r1pipe.plan import answerers, sizes
from r1pipe.plan.cut import Cut, cuts
from r1pipe.plan.sizes import FULL, adapters, parameters, stored, trunk, without_mtp
from r1pipe.runs import checkpoints, hosts, machine
from r1pipe.runs.reward_model_quality import KINDS

Model = ModelConfig | HFConfig
MEBIBYTE = 2**20
TOKEN = 12  # bytes of a drawn token and its log-probability in a checkpoint
SPARE = 64 * MEBIBYTE  # for small files: tokenizer, rollouts, logs


@dataclass(frozen=True)
class Need:
    """Memory of one rank, in bytes."""

    states: float  # of all models: weights, master weights, gradients, moments
    activations: float  # of the largest training pass
    logits: float
    cache: float  # of the sampler
    copy: float = 0.0  # what engine.async_save writes from
    before: float = 0.0  # weights and cache of who answers before training begins

    @property
    def peak(self) -> float:
        """Training and sampling alternate; what is held `before` training makes room for it."""
        return max(self.before, self.states + self.copy + max(self.activations + self.logits, self.cache))

    def parts(self) -> str:
        """The parts in MiB, for messages."""
        sizes = {"states": self.states, "activations": self.activations, "logits": self.logits}
        sizes |= {"cache": self.cache} if self.cache else {}
        sizes |= {"copy": self.copy} if self.copy else {}
        sizes |= {"before training": self.before} if self.before else {}
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
        size += written_again(config, weights, trained) * number + trained * optimizer_bytes(engine)
    if isinstance(stage, RLConfig) and stage.kl_coef and 0 < stage.reference_every <= stage.max_steps:
        # the reference is updated during the run
        size += number * (adapters(model) or without_mtp(model))
    if isinstance(stage, RLConfig):  # completions that wait for their step, at their longest
        completions = engine.async_steps * stage.prompts_per_step * stage.group_size
        size += TOKEN * completions * stage.sampling.max_tokens
    return size


def written_again(config: RunConfig, weights: int, trained: int) -> int:
    """Number of weights that an engine's state has beside the optimizer's."""
    level = config.engine.zero_level
    if adapters(config.model):
        return trained if level < 3 else 0
    return weights if level < 3 else weights - trained


def copied(config: RunConfig) -> float:
    """Bytes that the first rank copies to save while training goes on."""
    engine, total = config.engine, 0.0
    if engine.async_save:
        for weights, trained in engines(config):
            again = written_again(config, weights, trained) * weight_bytes(engine)
            total += again / (all_ranks(engine) if engine.zero_level == 3 else 1)
            total += trained * optimizer_bytes(engine) / (all_ranks(engine) if engine.zero_level else 1)
    return total


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


def all_ranks(engine: EngineConfig) -> int:
    """Ranks of the whole job; where the machines are not known yet, those of one."""
    if engine.slurm is not None:
        return engine.ranks * engine.slurm.nodes
    if engine.hostfile is not None and Path(engine.hostfile).is_file():
        return sum(hosts.slots_of(engine.hostfile).values())
    return engine.ranks


def weight_bytes(engine: EngineConfig) -> int:
    return sizes.weight_bytes(engine.precision)


def optimizer_bytes(engine: EngineConfig) -> int:
    return sizes.optimizer_bytes(engine.precision, engine.moments, engine.zero_level)


def needed(config: RunConfig, prompt: int) -> Need:
    """Memory of the rank that needs most; `prompt`: tokens of the longest prompt. Python and torch take
    another half GiB.

    For two GRPO updates of conf/model/small on a CPU (float32, 8,192 tokens a pass) it is 13 to 63% too high;
    for 33M weights of transformers, with adapters or not, from 13% too low to 14% too high. glibc may keep as
    much again as the activations of what is freed; with MALLOC_MMAP_THRESHOLD_=1000000 it gives that back.
    """
    model, engine = config.model, config.engine
    shares: Sequence[Cut[Model]] = [Cut(model)]
    if isinstance(model, ModelConfig):
        shares = cuts(model, engine.schedule, engine.pipeline)
    return max((of_rank(config, share, prompt) for share in shares), key=lambda need: need.peak)


def of_rank(config: RunConfig, share: Cut[Model], prompt: int) -> Need:
    """Memory of one rank of a pipeline."""
    model, engine, stage = config.model, config.engine, config.stage
    number, context, ranks = weight_bytes(engine), model.max_position_embeddings, all_ranks(engine)
    if isinstance(stage, RLConfig):  # tokens of the largest training pass
        longest = min(stage.sampling.max_tokens, context)
        rows = -(
            -stage.prompts_per_step * stage.group_size // (stage.minibatches * (ranks // engine.pipeline))
        )
        tokens = min(max(stage.max_tokens_per_micro_batch, longest), rows * (prompt + longest))
    else:
        length = getattr(stage, "sequence_length", 2 * context)  # a reward model reads pairs
        rows = -(-getattr(stage, "batch_size") // (ranks * engine.gradient_accumulation))  # noqa: B009
        tokens = rows * length
        if isinstance(stage, RewardModelConfig):
            tokens = min(tokens, max(length, stage.max_tokens_per_micro_batch))
    reads = isinstance(stage, RewardModelConfig)  # it has no head
    head = 0.0 if reads else sizes.logits(tokens, share.model.vocab_size)
    how = sizes.recomputation(engine)
    kept = share.passes * (stored(share.model, how) + share.between) + sizes.working(model, how)
    cache = 0.0
    if isinstance(stage, RLConfig) and engine.sampler != "vllm":  # which has memory of its own
        completions = -(-stage.prompts_per_step * stage.group_size // ranks)
        length = min(prompt + stage.sampling.max_tokens, context)
        slots = min(stage.sampling.max_num_seqs, completions)
        cache = slots * length * model.num_hidden_layers * sizes.cache_entry(model) * number
    activations = number * (tokens * kept + repeated(config, tokens, prompt))
    copy = copied(replace(config, model=share.model))
    beside = answerers.beside(config) / (ranks if engine.zero_level == 3 else 1)
    held = states(config, share) + beside
    return Need(held, activations, head, cache, copy, answerers.before(config, prompt))


def repeated(config: RunConfig, tokens: int, prompt: int) -> float:
    """Elements that a pass of so many tokens keeps of prompts of so many, which its completions share: with a
    model of transformers each has the prompt's keys and values beside its own."""
    model, stage = config.model, config.stage
    if not isinstance(model, HFConfig) or not isinstance(stage, RLConfig) or config.engine.recompute:
        return 0.0
    prompt = min(prompt, tokens // 2)  # with more, there is less room for completions
    completions = (tokens - prompt) / min(stage.sampling.max_tokens, tokens)
    return completions * prompt * model.num_hidden_layers * model.cache_width


def held(config: RunConfig, weights: int, trained: int, whole: int) -> float:
    """Bytes of a rank for one engine: ranks may share out the experts, and then fewer share their states.
    `whole`: weights that every rank gathers to sample; 0: none."""
    engine, number = config.engine, weight_bytes(config.engine)
    level, size, apart = engine.zero_level, engine.expert_parallel, shared_out(config)
    beside = max(1, all_ranks(engine) // engine.pipeline)
    each = {"weight": number, "gradient": FULL, "optimizer": optimizer_bytes(engine)}
    dense = sizes.states(weights - apart, trained - apart, level=level, ranks=beside, **each)
    experts = sizes.states(apart / size, apart / size, level=level, ranks=max(1, beside // size), **each)
    if not whole:
        return dense.total + experts.total
    return dense.total - dense.weights + experts.total + number * whole


def shared_out(config: RunConfig) -> int:
    """Number of weights of the routed experts that ranks share out; those of frozen layers they do not."""
    model, stage = config.model, config.stage
    if isinstance(model, HFConfig) or config.engine.expert_parallel == 1:
        return 0
    frozen = isinstance(stage, RLConfig | RewardModelConfig)
    return sizes.routed(replace(model, num_nextn_predict_layers=0) if frozen else model)


def states(config: RunConfig, share: Cut[Model] | None = None) -> float:
    """Bytes of a rank for engines, reference and reward models. `share`: of a pipeline."""
    engine, stage, number = config.engine, config.stage, weight_bytes(config.engine)
    share = share or Cut(config.model)
    own, total = replace(config, model=share.model), 0.0
    for place, (weights, trained) in enumerate(engines(own)):
        gathered = isinstance(stage, RLConfig) and place == 0 and engine.sampler != "vllm"
        total += held(own, weights, trained, whole=engines(config)[0][0] if gathered else 0)
        total += number * share.at_once * (weights - shared_out(own) * (1 - 1 / engine.expert_parallel))
    if isinstance(stage, RLConfig):
        among = all_ranks(engine) if engine.zero_level == 3 else 1
        # with adapters the reference is the policy without them
        if stage.kl_coef > 0 and not adapters(config.model):
            apart = shared_out(own) if engine.zero_level < 3 else 0
            spread = apart - apart / engine.expert_parallel
            total += number * (without_mtp(share.model) - spread) / among
        judges = len(KINDS) * (stage.preference is not None)
        total += number * judges * trunk(config.model) / among
    return total
