"""The types of every config value and a sentence for each; the values live in conf/ alone.

A dataclass here or in `parts` has no default values. `r1pipe.config.load` turns a resolved mapping into these
classes and checks types; `r1pipe.config.rules` holds what must be true across fields.
"""

from dataclasses import dataclass

from r1pipe.config.parts import (
    DataConfig,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    RouterConfig,
    SamplingConfig,
    SourceConfig,
    TrackingConfig,
    TripwiresConfig,
)

__all__ = [
    "STAGE_TYPES",
    "CosineConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EvalConfig",
    "EvaluateConfig",
    "FilterConfig",
    "FineTuneConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "ParentRef",
    "PreferenceConfig",
    "PretrainConfig",
    "RLConfig",
    "RecipeConfig",
    "RejectionConfig",
    "RewardModelConfig",
    "RewardsConfig",
    "RopeScaling",
    "RouterConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "SourceConfig",
    "StageConfig",
    "TrackingConfig",
]


@dataclass
class CosineConfig:
    """What the reward `cosine` gives, by length (Yeo et al., arXiv 2502.03373)."""

    right_shortest: float  # a right answer, towards no token
    right_longest: float  # a right answer, towards sampling.max_tokens
    wrong_shortest: float  # a wrong answer, towards no token
    wrong_longest: float  # a wrong answer, towards sampling.max_tokens
    exceeded: float  # an answer that was cut off


@dataclass
class RewardsConfig:
    """Which rule rewards are summed, and what each weighs."""

    weights: dict[str, float]  # reward name -> weight; names: reinforcement.RULE_REWARDS
    truncation_penalty: float  # added to the reward of a completion that was cut off (0: none)
    max_failed: float  # share of a step's verdicts of one reward that may fail; above it the job stops
    cosine: CosineConfig
    overlong_cache: float  # share of sampling.max_tokens, at its end, in which `overlong` grows
    repetition_ngram: int  # tokens of the n-grams that `repetition` counts


@dataclass
class StageConfig:
    """What every stage has."""

    name: str  # the file in conf/stage/; one of STAGE_TYPES below
    script: str  # file in stages/
    starts_from: str | None  # stage whose checkpoint gives the weights; null: random weights
    reads: list[str]  # stages whose checkpoints are read besides (sampled from, or used as reward models)
    max_steps: int  # optimizer steps at most; 0: as many as the data gives
    save_every: int  # steps between checkpoints; 0: only at the end
    keep: int  # newest checkpoints kept; one that another run names as its parent is kept besides
    keep_best: str | None  # metric whose best checkpoint is kept besides, e.g. eval/pass_at_1; null: none
    keep_best_direction: str  # which is best: "max" or "min"
    optim: OptimConfig
    router: RouterConfig
    eval: EvalConfig


@dataclass
class PretrainConfig(StageConfig):
    """Next-token prediction on packed documents, from random weights."""

    batch_size: int  # sequences per optimizer step, all ranks together
    sequence_length: int  # tokens per packed sequence
    mtp_weight: float  # weight of the multi-token prediction loss, where the model has such layers


@dataclass
class FineTuneConfig(StageConfig):
    """What every supervised fine-tuning has; the loss covers responses only."""

    epochs: int  # passes over the data
    batch_size: int  # packed sequences per optimizer step, all ranks together
    sequence_length: int  # tokens per packed sequence
    mtp_weight: float  # weight of the multi-token prediction loss, where the model has such layers


@dataclass
class SFTConfig(FineTuneConfig):
    """Supervised fine-tuning on responses only (cold start, and the control)."""

    demonstrations: int  # worked solutions to train on
    styles: dict[str, float]  # world: share of each solution strategy; empty: the corpus's own mix
    correct_only: bool  # drop traces whose answer is wrong


@dataclass
class PreferenceConfig:
    """Preference rewards in all-scenario RL (R1 section 2.3.4: in the last steps only; they get hacked)."""

    last_steps: int  # general prompts and preference rewards are on for this many last steps
    general_share: float  # share of general prompts in those steps
    general_kinds: dict[str, float]  # share of each general task among them; empty: as the data has them
    helpful_weight: float  # weight of the helpfulness model's reward (on the summary)
    harmless_weight: float  # weight of the harmlessness model's reward (on the whole response)
    min_accuracy: float  # share of held-out pairs that the helpfulness model must put in the right order
    min_auc: float  # area under the ROC curve that the harmlessness model must reach on held-out labels
    max_length_correlation: float  # of a model's scores with the responses' lengths, whatever the sign
    force: bool  # use reward models that are beyond these bounds, too: they are told of, not refused


@dataclass
class PPOConfig:
    """The value model beside the policy, and what is made of its values (DeepSeekMath section 4.1.1)."""

    gamma: float  # discount of each further token's reward
    gae_lambda: float  # of generalised advantage estimation: 1 trusts what was earned, 0 the value model
    whiten: bool  # shift and scale a step's advantages, over all its tokens, to mean 0 and deviation 1
    value_lr_factor: float  # the value model's learning rate over the policy's, along the same schedule
    value_clip: (
        float | None
    )  # a value's loss stops where it moves further in a step; null: plain squared error
    value_warmup_steps: int  # first steps in which the value model learns alone


@dataclass
class RLConfig(StageConfig):
    """GRPO (DeepSeekMath section 4.1; R1 section 2.2), or PPO with a value model (section 4.1.1)."""

    algorithm: str  # the file in conf/stage/part/algorithm/, whose values these are: grpo, ppo
    ppo: PPOConfig | None  # with algorithm=ppo only
    prompts_per_step: int  # questions per step, all ranks together
    group_size: int  # G completions per question; ppo: 1 or more
    minibatches: int  # optimizer steps per rollout batch and inner epoch
    inner_epochs: int  # passes over one rollout batch
    loss: str  # the file in conf/stage/part/loss/, whose values these are: grpo, dr_grpo, dapo, gspo, cispo
    ratio: str  # of policy to sampler: each "token"'s, or the geometric mean over the "sequence" (GSPO)
    surrogate: str  # "clipped" (PPO's minimum), or "cispo": weighted by the clipped ratio (CISPO)
    clip: float  # epsilon below 1: the ratio is clipped at 1 - clip
    clip_high: float | None  # epsilon above 1: the ratio is clipped at 1 + clip_high; null: as `clip`
    loss_aggregation: (
        str  # over each "sequence" first (GRPO), every "token" (DAPO), or by a "constant" (Dr.GRPO)
    )
    normalise_std: bool  # divide advantages by the group's standard deviation
    importance_cap: float  # truncated importance sampling between sampler and trainer, at most this; 0: none
    kl_coef: float  # weight of the KL to the reference; 0: no KL and no reference
    kl_estimator: str  # "k1" (log ratio), "k2" (its square, halved) or "k3" (DeepSeekMath's)
    kl_in: str  # "loss", or "reward": taken off it before the group's advantages (ppo: off each token's)
    reference_every: int  # steps after which the policy replaces the reference; 0: never
    max_sampling_batches: (
        int  # rollout batches a step draws at most, until enough groups teach (DAPO); 1: off
    )
    max_tokens_per_micro_batch: int  # padded tokens per forward pass on one rank
    routing_check_samples: (
        int  # completions a step and rank, the shortest, whose experts are chosen again; 0: none
    )
    sampling: SamplingConfig
    rewards: RewardsConfig
    preference: PreferenceConfig | None  # all-scenario only


@dataclass
class FilterConfig:
    """What rejection sampling keeps (R1 section 2.3.3; no thresholds were published)."""

    max_paragraph: int  # longest paragraph of the reasoning, in words
    min_language_consistency: float  # share of the prompt's language in reasoning and summary
    allow_code_blocks: bool  # code fences in the reasoning
    max_repetition: float  # share of repeated 4-grams in the reasoning
    ngram_overlap: int  # n of the n-gram overlap with evaluation questions; 0: off
    per_prompt: int  # completions kept per prompt at most


@dataclass
class RejectionConfig(FineTuneConfig):
    """Rejection sampling from the RL checkpoint, then SFT from the base (R1 section 2.3.3)."""

    prompts: int  # reasoning prompts sampled
    samples_per_prompt: int  # completions per prompt
    general_ratio: float  # general samples per reasoning sample kept (R1: 200k / 600k)
    general_kinds: dict[str, float]  # share of each general task; empty: as the data has them
    sampling: SamplingConfig
    filters: FilterConfig


@dataclass
class DistillConfig(FineTuneConfig):
    """SFT of another base, the student, on rejection sampling's samples (R1 section 2.4)."""


@dataclass
class RewardModelConfig(StageConfig):
    """Helpfulness (pairwise, Bradley-Terry) and harmlessness (point-wise) heads (R1 supplement)."""

    pairs: int  # preference pairs to train on
    labels: int  # safety labels to train on
    held_out: int  # pairs, and labels, to judge the models on
    epochs: int  # passes over each
    batch_size: int  # pairs (or labels) per optimizer step, all ranks together


@dataclass
class EvaluateConfig(StageConfig):
    """No training: takes a checkpoint in and measures it."""


STAGE_TYPES: dict[str, type[StageConfig]] = {
    "pretrain": PretrainConfig,
    "base": EvaluateConfig,
    "evaluate": EvaluateConfig,
    "cold_start": SFTConfig,
    "control_sft": SFTConfig,
    "grpo": RLConfig,
    "zero": RLConfig,
    "rejection_sft": RejectionConfig,
    "reward_model": RewardModelConfig,
    "all_scenario": RLConfig,
    "distill": DistillConfig,
}


@dataclass
class RecipeConfig:
    """A whole reproduction: which stages, in which order; its values for them lie in the same file."""

    name: str  # the file in conf/recipe/
    stages: list[str]  # the stages of the recipe itself, in order
    controls: list[str]  # stages run beside them for comparison


@dataclass
class ParentRef:
    """A resolved parent: which checkpoint, and how to know that it is still the same."""

    stage: str  # the stage that made it
    run_id: str  # its run folder's name ("bundled" for data/base)
    checkpoint: str  # folder with the weights
    hash: str  # hash of its manifest


@dataclass
class RunConfig:
    """All that a job knows: the content of config.json."""

    seed: int  # root of every random stream
    root: str  # where run folders and the MLflow store go
    pipeline: str  # name that groups the runs of one reproduction
    parent: str | None  # CHECKPOINT to start from instead of the newest of `stage.starts_from`
    model: ModelConfig
    data: DataConfig
    engine: EngineConfig
    stage: StageConfig
    recipe: RecipeConfig
    tracking: TrackingConfig
    tripwires: TripwiresConfig  # of reinforcement
    weights_from: ParentRef | None  # filled at launch
    reads_from: dict[str, ParentRef]  # filled at launch: stage name -> checkpoint
