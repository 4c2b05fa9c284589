"""What the stages have in common, and the supervised ones; reinforcement is in `rl`."""

from dataclasses import dataclass
from typing import Literal

from r1pipe.config.fields import AboveZero, Count, NonNegative, Positive, Rules, Share, Strict
from r1pipe.config.judge import EvaluatorConfig, FilterJudgeConfig, LabelJudgeConfig


@dataclass
class OptimConfig(Strict):
    """AdamW and its schedule (R1 supplement; V3 section 4.2)."""

    lr: NonNegative  # peak learning rate
    min_lr: NonNegative  # learning rate at the last step
    schedule: Literal["constant", "linear", "cosine"]  # "constant", "linear" or "cosine", after the warm-up
    warmup_steps: Count  # steps of linear warm-up
    betas: list[float]  # AdamW's betas
    eps: NonNegative  # AdamW's epsilon
    weight_decay: NonNegative  # on matrices only
    grad_clip: NonNegative  # global gradient norm is clipped to this
    max_skipped: Count  # steps in a row skipped because loss or gradient is not finite; one more ends the job


@dataclass
class RouterConfig(Strict):
    """Load balancing of the experts (V3 section 2.1.2)."""

    bias_rate: NonNegative  # step of the bias update, once per optimizer step; 0 freezes the bias
    balance_alpha: NonNegative  # weight of the sequence-wise balance loss (V3 eq. 17); 0: none


@dataclass
class SamplingConfig(Strict):
    """How completions are drawn."""

    temperature: NonNegative  # 0 is greedy
    top_p: Share  # nucleus; 1 keeps everything
    max_tokens: Positive  # longest completion
    max_num_seqs: Positive  # sequences decoded together on one rank


@dataclass
class EvalConfig(Strict):
    """Held-out evaluation, at the end of a stage and every so often in between."""

    split: Literal["dev", "test"]  # dev: while tuning
    problems: Count  # held-out reasoning problems at the end
    samples: Positive  # k completions per problem (pass@1 is their mean, cons@k their vote)
    general: Count  # held-out general prompts at the end (split evenly over the kinds)
    temperature: NonNegative  # R1: 0.6
    top_p: Share  # R1: 0.95
    greedy: bool  # also score one greedy completion per problem
    max_tokens: Positive  # longest completion
    max_num_seqs: Positive  # sequences decoded together on one rank
    every: Count  # steps between short evaluations while training; 0: none
    every_problems: Count  # dev problems of such a short evaluation, one sample each
    shown: Count  # fixed prompts whose completions are kept for the report
    harder: Count = 0  # problems of each level above those of `data.levels`, where the data has such
    identity: Count = 0  # of the fifty questions who it is, asked at the end


@dataclass
class CodeConfig(Strict):
    """What a generated program may use, wherever answers are checked, and what it earns."""

    cpu_seconds: AboveZero  # processor time of each test, in every sandbox
    memory_mb: Positive  # memory of a program, in every sandbox
    time_limit_factor: AboveZero  # a task's own limit times this holds where it is shorter
    partial_credit: bool  # a program earns the share of tests that it passes; else 1 for all and 0


@dataclass
class StageConfig(Strict):
    """What every stage has."""

    name: str  # the file in conf/stage/; one of run.STAGE_TYPES
    script: str  # file in stages/
    starts_from: str | None  # stage whose checkpoint gives the weights; null: random weights
    reads: list[str]  # stages whose checkpoints are read besides (sampled from, or used as reward models)
    max_steps: Count  # optimizer steps at most; 0: as many as the data gives
    save_every: Count  # steps between checkpoints; 0: only at the end
    keep: Positive  # newest checkpoints kept; one that another run names as its parent is kept besides
    keep_best: str | None  # metric whose best checkpoint is kept besides, e.g. eval/pass_at_1; null: none
    keep_best_direction: Literal["max", "min"]  # whether more of it is better, or less
    early_stopping_patience: Count  # values of keep_best in a row without improvement that end it; 0: off
    optim: OptimConfig
    router: RouterConfig
    eval: EvalConfig
    code: CodeConfig


@dataclass
class PretrainConfig(StageConfig):
    """Next-token prediction on packed documents, from random weights."""

    batch_size: Positive  # sequences per optimizer step, all ranks together
    sequence_length: Positive  # tokens per packed sequence
    mtp_weight: NonNegative  # weight of the multi-token prediction loss, where the model has such layers


@dataclass
class FineTuneConfig(StageConfig):
    """What every supervised fine-tuning has; the loss covers responses only."""

    epochs: Positive  # passes over the data
    batch_size: Positive  # packed sequences per optimizer step, all ranks together
    sequence_length: Positive  # tokens per packed sequence
    mtp_weight: NonNegative  # weight of the multi-token prediction loss, where the model has such layers


@dataclass
class SFTConfig(FineTuneConfig):
    """Supervised fine-tuning on responses only (cold start, and the control)."""

    demonstrations: Positive  # worked solutions to train on
    styles: dict[str, NonNegative]  # share of each strategy (world) or task (files); empty: as in the data
    correct_only: bool  # drop traces whose answer is wrong


@dataclass
class FilterConfig(Strict):
    """What rejection sampling keeps (R1 section 2.3.3; no thresholds were published)."""

    max_paragraph: Count  # longest paragraph of the reasoning, in words
    min_language_consistency: Share  # share of the prompt's language in reasoning and summary
    allow_code_blocks: bool  # code fences in the reasoning
    max_repetition: Share  # share of repeated 4-grams in the reasoning
    ngram_overlap: Count  # n of the n-grams shared with evaluation questions; shorter ones as a whole; 0: off
    per_prompt: Positive  # completions kept per prompt at most


@dataclass
class RejectionConfig(FineTuneConfig):
    """Rejection sampling from the RL checkpoint, then SFT from the base (R1 section 2.3.3)."""

    prompts: Positive  # reasoning prompts sampled
    samples_per_prompt: Positive  # completions per prompt
    general_ratio: NonNegative  # general samples per reasoning sample kept (R1: 200k / 600k)
    general_kinds: dict[str, NonNegative]  # share of each general task; empty: as the data has them
    sampling: SamplingConfig
    filters: FilterConfig
    judge: FilterJudgeConfig | None  # with judge=MODEL


@dataclass
class RewardModelConfig(StageConfig):
    """Helpfulness (pairwise, Bradley-Terry) and harmlessness (point-wise) heads (R1 supplement)."""

    pairs: Positive  # preference pairs to train on
    labels: Positive  # safety labels to train on
    held_out: Positive  # pairs, and labels, to judge the models on
    epochs: Positive  # passes over each
    batch_size: Positive  # pairs (or labels) per optimizer step, all ranks together
    max_tokens_per_micro_batch: Positive  # padded tokens per forward pass on one rank; a pair is not split
    judge: LabelJudgeConfig | None  # with judge=MODEL


@dataclass
class EvaluateConfig(StageConfig):
    """No training: takes a checkpoint in and measures it."""

    judge: EvaluatorConfig | None  # with judge=MODEL


def optim_rules(optim: OptimConfig) -> Rules:
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield f"stage.optim.betas={optim.betas} must be two numbers from 0 to below 1"
    if optim.min_lr > optim.lr:
        yield f"stage.optim.min_lr={optim.min_lr:g} is above stage.optim.lr={optim.lr:g}"


def retention_rules(stage: StageConfig) -> Rules:
    """A checkpoint is judged by what was logged at its own step."""
    best, every = stage.keep_best, stage.eval.every
    is_judged = best is not None and not isinstance(stage, RewardModelConfig | EvaluateConfig)
    if stage.early_stopping_patience and not is_judged:
        yield (
            f"{stage.early_stopping_patience=} needs stage.keep_best=METRIC, which it watches, in a "
            "stage of SFT, pre-training or reinforcement learning"
        )
    if best is None:
        return
    if stage.save_every == 0:
        yield f"{stage.keep_best=!s} needs stage.save_every above 0: there is one checkpoint else"
    if best.startswith("eval/") and (every == 0 or every % stage.save_every):
        yield (
            f"{stage.keep_best=!s} needs {stage.eval.every=} to be a multiple of "
            f"{stage.save_every=}: what is evaluated must be saved too"
        )
