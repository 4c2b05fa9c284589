"""What must be true of values and across them; every message names the key and what it may be.

One small function per part; each yields (what must hold, message), and `check` raises the first that fails.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from r1pipe.config.architecture import Rules, check_all, model_rules
from r1pipe.config.engine_rules import engine_rules, fp8_rules
from r1pipe.config.reinforcement import rl_rules
from r1pipe.config.schema import (
    EvalConfig,
    EvaluateConfig,
    FineTuneConfig,
    OptimConfig,
    PretrainConfig,
    RejectionConfig,
    RewardModelConfig,
    RLConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
)
from r1pipe.core.errors import nearest

# Numbers that must be at least 1 wherever they occur; every other number must be at least 0.
# What a model's shape must be is in `architecture`.
POSITIVE = {
    *("ranks", "max_tokens", "max_num_seqs", "batch_size", "sequence_length", "epochs", "keep", "samples"),
    *(
        "prompts_per_step",
        "minibatches",
        "max_tokens_per_micro_batch",
        "prompts",
        "samples_per_prompt",
        "per_prompt",
    ),
    *("demonstrations", "inner_epochs", "pairs", "labels", "held_out", "gradient_accumulation"),
    *("max_sampling_batches", "repetition_ngram", "factor", "original_max_position_embeddings"),
    "longest_row",
}
SIGNED = {"truncation_penalty", "weights", "cosine"}  # rewards may punish
WITH_DOCUMENTS = "world"  # the data.kind that has text to pre-train on
SHARES = {
    "top_p",
    "min_language_consistency",
    "max_repetition",
    "general_share",
    "max_failed",
    "overlong_cache",
    "max_bad_rows",
    "min_accuracy",
    "min_auc",
    "max_length_correlation",
}
CHOICES = {
    "engine.accelerator": ("cpu", "cuda", "auto"),
    "engine.attention": ("sdpa", "flex"),
    "engine.precision": ("fp32", "bf16", "fp8"),
    "engine.kernels": ("auto", "triton", "scaled_mm", "deepgemm", "reference"),
    "engine.fp8.gradients": ("tile", "block", "tensor", "none"),
    "engine.moments": ("fp32", "bf16"),
    "engine.launcher": ("local", "pdsh", "openmpi", "slurm"),
    "engine.zero_level": (0, 1, 2, 3),
    "data.kind": ("world", "files", "reasoning_gym"),
    "data.bad_rows": ("refuse", "set_aside"),
    "stage.optim.schedule": ("constant", "linear", "cosine"),
    "stage.algorithm": ("grpo", "ppo"),
    "stage.loss": ("grpo", "dr_grpo", "dapo", "gspo", "cispo"),
    "stage.ratio": ("token", "sequence"),
    "stage.surrogate": ("clipped", "cispo"),
    "stage.loss_aggregation": ("sequence", "token", "constant"),
    "stage.kl_estimator": ("k1", "k2", "k3"),
    "stage.kl_in": ("loss", "reward"),
    "stage.eval.split": ("dev", "test"),
    "stage.keep_best_direction": ("max", "min"),
}


TRIP_ACTIONS = ("off", "warn", "pause", "stop")
# What r1pipe/train/rl/tripwires.py knows; it has the causes.
TRIPWIRES = (
    *("truncation", "no_variance", "entropy", "kl", "logprob_gap", "repetition", "reward_hacking"),
    *("length", "verifier", "max_vio", "non_finite", "slow_step"),
)


def check(config: RunConfig) -> None:
    """Raises ConfigError on the first rule that does not hold."""
    check_all(every_rule(config))


def every_rule(config: RunConfig) -> Rules:
    values = dict(leaves(config, ""))
    yield from ranges(values)
    yield from model_rules(config.model)
    yield from fp8_rules(config.engine, config.model)
    yield from engine_rules(config.engine)
    yield from optim_rules(config.stage.optim)
    yield from eval_rules(config.stage.eval, config)
    yield from retention_rules(config.stage)
    yield from stage_rules(config)
    yield from tripwire_rules(config)


def leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if is_dataclass(node):
        for field in fields(node):
            yield from leaves(getattr(node, field.name), f"{key}.{field.name}" if key else field.name)
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}")
    else:
        yield key, node


def ranges(values: dict[str, Any]) -> Rules:
    for key, value in values.items():
        name = key.rpartition(".")[2]
        if key in CHOICES:
            yield value in CHOICES[key], f"{key}={value} is none of {', '.join(map(str, CHOICES[key]))}"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            signed = bool(SIGNED & set(key.split(".")))
            yield math.isfinite(value), f"{key}={value} is not finite"
            yield signed or value >= 0, f"{key}={value} must be 0 or more"
            yield name not in POSITIVE or value >= 1, f"{key}={value} must be 1 or more"
            yield name not in SHARES or value <= 1, f"{key}={value} must be from 0 to 1"


def optim_rules(optim: OptimConfig) -> Rules:
    betas = optim.betas
    yield (
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        f"stage.optim.betas={betas} must be two numbers from 0 to below 1",
    )
    yield (
        optim.min_lr <= optim.lr,
        f"stage.optim.min_lr={optim.min_lr:g} is above stage.optim.lr={optim.lr:g}",
    )


def eval_rules(evaluation: EvalConfig, config: RunConfig) -> Rules:
    yield from length_rule("stage.eval.max_tokens", evaluation.max_tokens, config)
    yield (
        evaluation.shown <= evaluation.problems,
        f"stage.eval.shown={evaluation.shown} is more than stage.eval.problems={evaluation.problems}",
    )


def length_rule(key: str, length: int, config: RunConfig) -> Rules:
    longest = config.model.max_position_embeddings
    yield length <= longest, f"{key}={length} is longer than model.max_position_embeddings={longest}"


def retention_rules(stage: StageConfig) -> Rules:
    """A checkpoint is judged by what was logged at its own step."""
    if stage.keep_best is None:
        return
    yield (
        stage.save_every > 0,
        f"stage.keep_best={stage.keep_best} needs stage.save_every above 0: there is one checkpoint else",
    )
    every = stage.eval.every
    yield (
        not stage.keep_best.startswith("eval/") or (every > 0 and every % stage.save_every == 0),
        f"stage.keep_best={stage.keep_best} needs stage.eval.every={every} to be a multiple of "
        f"stage.save_every={stage.save_every}: what is evaluated must be saved too",
    )


def sampling_rules(sampling: SamplingConfig, config: RunConfig) -> Rules:
    yield from length_rule("stage.sampling.max_tokens", sampling.max_tokens, config)
    yield sampling.top_p > 0, "stage.sampling.top_p=0 leaves nothing to draw; it must be above 0"


def tripwire_rules(config: RunConfig) -> Rules:
    for name, wire in config.tripwires.wires.items():
        key = f"tripwires.wires.{name}"
        yield name in TRIPWIRES, f"{key} is no tripwire; {nearest(name, TRIPWIRES)}"
        yield (
            wire.action in TRIP_ACTIONS,
            f"{key}.action={wire.action} is none of {', '.join(TRIP_ACTIONS)}",
        )
        yield wire.steps >= 1, f"{key}.steps={wire.steps} must be 1 or more"


def stage_rules(config: RunConfig) -> Rules:
    stage, ranks = config.stage, config.engine.ranks
    yield (
        re.fullmatch(r"\w+\.py", stage.script) is not None,
        f"stage.script={stage.script} must be the name of a script in stages/, not a path",
    )
    if isinstance(stage, PretrainConfig | FineTuneConfig):
        yield from length_rule("stage.sequence_length", stage.sequence_length, config)
    if isinstance(stage, PretrainConfig | FineTuneConfig | RewardModelConfig):
        yield (
            stage.batch_size % ranks == 0,
            f"stage.batch_size={stage.batch_size} must be a multiple of engine.ranks={ranks}",
        )
    if isinstance(stage, PretrainConfig):
        yield (
            stage.max_steps > 0 or stage.name != "pretrain",
            "stage.max_steps=0: the corpus is endless; say how many",
        )
        yield (
            config.data.kind == WITH_DOCUMENTS,
            f"data={config.data.name} has no documents for stage={stage.name}; use data=world",
        )
    if isinstance(stage, RejectionConfig):
        yield from sampling_rules(stage.sampling, config)
    if isinstance(stage, RLConfig):
        yield from sampling_rules(stage.sampling, config)
        yield from rl_rules(stage, ranks)
    if isinstance(stage, EvaluateConfig) and stage.name == "evaluate":
        yield (
            config.parent is not None,
            "stage=evaluate needs parent=CHECKPOINT; or use `r1pipe eval CHECKPOINT`",
        )
