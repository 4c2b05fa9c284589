"""Reinforcement learning: GRPO and PPO, their rewards and tripwires, and what must be true of them."""

from dataclasses import dataclass
from typing import Literal

from r1pipe.config import custom_rewards
from r1pipe.config.fields import AboveZero, Count, NonNegative, Positive, Rules, Share, Strict
from r1pipe.config.importance import Importance, importance_rules
from r1pipe.config.judge import REWARDS as JUDGE_REWARDS
from r1pipe.config.judge import JudgeConfig
from r1pipe.config.stages import SamplingConfig, StageConfig
from r1pipe.core.errors import nearest

# What r1pipe/rewards knows, which the command line cannot import.
RULE_REWARDS = (
    "accuracy",
    "format",
    "language",
    "equation",
    "calculation",
    "cosine",
    "overlong",
    "repetition",
)
# Rewards that are no rules: where each one's weight stands.
WEIGHED_ELSEWHERE = {
    "helpful": "stage.preference.helpful_weight",
    "harmless": "stage.preference.harmless_weight",
    "kl": "stage.kl_coef",
}
# What r1pipe/train/rl/tripwires.py measures.
TRIPWIRES = (
    *("truncation", "no_variance", "entropy", "kl", "logprob_gap", "repetition", "reward_hacking"),
    *("length", "verifier", "max_vio", "non_finite", "slow_step"),
)


@dataclass
class CosineConfig(Strict):
    """What the reward `cosine` gives, by length (Yeo et al., arXiv 2502.03373)."""

    right_shortest: float  # a right answer, towards no token
    right_longest: float  # a right answer, towards sampling.max_tokens
    wrong_shortest: float  # a wrong answer, towards no token
    wrong_longest: float  # a wrong answer, towards sampling.max_tokens
    exceeded: float  # an answer that was cut off


@dataclass
class PluginLimits(Strict):
    """What a call of a plugin may take; beyond a limit it has no verdict (VERIFIER_FAILED)."""

    workers: Positive  # processes per rank; more for functions that wait for a server
    cpu_s: AboveZero  # processor time of a call
    sleep_s: AboveZero  # time that a call may sleep or wait
    memory_gb: AboveZero  # of a process, with what its libraries take


@dataclass
class RemoteLimits(Strict):
    """How servers are asked; one that does not answer in the end is INFRASTRUCTURE_FAILED."""

    connections: Positive  # requests at a time per rank
    timeout_s: AboveZero  # of a request
    retries: Count  # after no connection, no answer in time, or a status of 408, 429 or 5xx


@dataclass
class RewardsConfig(Strict):
    """Which rewards are summed, and what each weighs."""

    weights: dict[str, float]  # reward name -> weight; a rule (RULE_REWARDS) or a custom reward
    plugins: list[str]  # Python files whose functions are rewards; docs/rewards.md shows one
    plugin_limits: PluginLimits
    remote: dict[str, str]  # reward name -> URL of a server that scores
    remote_limits: RemoteLimits
    truncation_penalty: float  # added to the reward of a completion that was cut off (0: none)
    max_failed: Share  # share of a step's verdicts of one reward that may fail; above it the job stops
    cosine: CosineConfig
    overlong_cache: Share  # share of sampling.max_tokens, at its end, in which `overlong` grows
    repetition_ngram: Positive  # tokens of the n-grams that `repetition` counts


@dataclass
class PreferenceConfig(Strict):
    """Preference rewards in all-scenario RL (R1 section 2.3.4: in the last steps only; they get hacked)."""

    last_steps: Count  # general prompts and preference rewards are on for this many last steps
    general_share: Share  # share of general prompts in those steps
    general_kinds: dict[str, NonNegative]  # share of each task; empty: as in the data
    helpful_weight: NonNegative  # weight of the helpfulness model's reward (on the summary)
    harmless_weight: NonNegative  # weight of the harmlessness model's reward (on the whole response)
    min_accuracy: Share  # share of held-out pairs that the helpfulness model must put in the right order
    min_auc: Share  # area under the ROC curve that the harmlessness model must reach on held-out labels
    max_length_correlation: Share  # of a model's scores with the responses' lengths, whatever the sign
    force: bool  # use reward models that are beyond these bounds, too: a warning instead of a refusal


@dataclass
class PPOConfig(Strict):
    """The value model beside the policy, and what is made of its values (DeepSeekMath section 4.1.1)."""

    gamma: Share  # discount of each further token's reward
    gae_lambda: Share  # of generalised advantage estimation: 1 trusts what was earned, 0 the value model
    whiten: bool  # shift and scale a step's advantages, over all its tokens, to mean 0 and deviation 1
    value_lr_factor: NonNegative  # the value model's learning rate over the policy's
    value_clip: NonNegative | None  # furthest move of a value in a step; null: plain squared error
    value_warmup_steps: Count  # first steps in which the value model learns alone


@dataclass
class ReinforcementConfig(Strict):
    """GRPO (DeepSeekMath section 4.1; R1 section 2.2), or PPO with a value model (section 4.1.1)."""

    algorithm: Literal["grpo", "ppo"]  # the file in conf/stage/part/algorithm/, whose values these are
    ppo: PPOConfig | None  # with algorithm=ppo only
    prompts_per_step: Positive  # questions per step, all ranks together
    group_size: Positive  # G completions per question; ppo: 1 or more
    trained_per_group: Positive | None  # of G, the most varied in reward (PODS, arXiv 2504.13818); null: all
    minibatches: Positive  # optimizer steps per rollout batch and inner epoch
    inner_epochs: Positive  # passes over one rollout batch
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]  # the file in conf/stage/part/loss/
    ratio: Literal["token", "sequence"]  # of policy to sampler; sequence: the geometric mean (GSPO)
    surrogate: Literal["clipped", "cispo"]  # PPO's minimum, or weighted by the clipped ratio (CISPO)
    clip: NonNegative  # epsilon below 1: the ratio is clipped at 1 - clip
    clip_high: NonNegative | None  # epsilon above 1: the ratio is clipped at 1 + clip_high; null: as `clip`
    loss_aggregation: Literal["sequence", "token", "constant"]  # GRPO, DAPO, Dr.GRPO
    normalise_std: bool  # divide advantages by the group's standard deviation
    importance: Importance  # how pi_trainer / pi_sampler weighs tokens; null: settled by the engine's sampler
    importance_cap: NonNegative  # ratios above are truncated to it, or masked (weight 0)
    importance_floor: NonNegative  # ratios below, in the same way
    kl_coef: NonNegative  # weight of the KL to the reference; 0: no KL and no reference
    kl_estimator: Literal["k1", "k2", "k3"]  # log ratio, its square halved, or DeepSeekMath's
    kl_in: Literal["loss", "reward"]  # reward: subtracted before the group's advantages (ppo: per token)
    reference_every: Count  # steps after which the policy replaces the reference; 0: never
    max_sampling_batches: Positive  # most rollout batches of a step, until enough groups have a signal (DAPO)
    max_tokens_per_micro_batch: Positive  # padded tokens per forward pass on one rank
    replay_routing: bool  # the trainer takes over the sampler's choices of experts (R3, arXiv 2510.11370)
    routing_check_samples: Count  # completions per step and rank whose routing is compared; 0: none
    sampling: SamplingConfig
    rewards: RewardsConfig
    preference: PreferenceConfig | None  # all-scenario only
    judge: JudgeConfig | None  # with judge=MODEL


@dataclass
class RLConfig(ReinforcementConfig, StageConfig):
    """A stage of reinforcement."""


@dataclass
class WireConfig(Strict):
    """When a tripwire trips, and what then (r1pipe/train/rl/tripwires.py says what it measures)."""

    limit: NonNegative  # the number that must not be passed
    steps: Positive  # steps in a row beyond it
    action: Literal["off", "warn", "pause", "stop"]  # pause: with a checkpoint


@dataclass
class TripwiresConfig(Strict):
    """The tripwires of an RL run."""

    name: str  # the file in conf/tripwires/
    wires: dict[str, WireConfig]


def rl_rules(stage: RLConfig, ranks: int, token_advantages: bool = False, scored: bool = False) -> Rules:
    """`token_advantages`: a teacher gives each token an advantage, so that there need be no reward and no
    group; `scored`: it scores answers, so that there need be no other reward."""
    all_ranks = f"{ranks} ranks (engine.ranks on each machine)"
    if stage.prompts_per_step % ranks:
        yield f"{stage.prompts_per_step=} must be a multiple of the {all_ranks}"
    outputs = stage.prompts_per_step * (stage.trained_per_group or stage.group_size)
    per_group = "trained_per_group" if stage.trained_per_group else "group_size"
    if outputs % (stage.minibatches * ranks):
        yield (
            f"stage.prompts_per_step x stage.{per_group} = {outputs} must divide evenly into "
            f"{stage.minibatches=} on {all_ranks}"
        )
    if stage.group_size < 2 and stage.algorithm != "ppo" and not (token_advantages and not any_weight(stage)):
        yield f"{stage.group_size=}: advantages compare completions of one prompt; give 2 or more"
    if stage.trained_per_group and not 2 <= stage.trained_per_group <= stage.group_size:
        yield f"{stage.trained_per_group=} must be at least 2 and at most {stage.group_size=}"
    if stage.sampling.temperature == 0:
        yield "stage.sampling.temperature=0 draws a group of equals; it must be above 0"
    # the ratio compares probabilities over the whole vocabulary: draws from a part of it would bias it
    if stage.sampling.top_p != 1:
        yield f"{stage.sampling.top_p=:g}: reinforcement learns from the whole distribution; it must be 1"
    yield from kl_rules(stage)
    yield from ppo_rules(stage)
    yield from importance_rules(stage.importance, stage.importance_cap, stage.importance_floor)
    if stage.max_steps == 0:
        yield "stage.max_steps=0: prompts are endless; say how many"
    yield from weight_rules(stage)
    if not any_weight(stage) and not token_advantages and not scored:
        yield "stage.rewards.weights are all 0; nothing would be learned"
    if stage.preference and stage.preference.last_steps > stage.max_steps:
        yield f"{stage.preference.last_steps=} is more than {stage.max_steps=}"


def weight_rules(stage: RLConfig) -> Rules:
    """A weight of what no reward is would be refused after the first rollout, or count for nothing."""
    for name in stage.rewards.weights:
        if elsewhere := WEIGHED_ELSEWHERE.get(name):
            if stage.preference is None and elsewhere.startswith("stage.preference"):
                elsewhere += " in stage=all_scenario, which asks reward models"
            yield (
                f"stage.rewards.weights.{name} is no rule reward; its weight is {elsewhere}; "
                f"rules: {', '.join(RULE_REWARDS)}"
            )
    custom_rewards_of(stage.rewards)


def any_weight(stage: ReinforcementConfig) -> bool:
    return any(stage.rewards.weights.values())


def custom_rewards_of(rewards: RewardsConfig) -> list[custom_rewards.CustomReward]:
    """The rewards in `weights` that are no rules. Raises ConfigError."""
    known = (*RULE_REWARDS, *JUDGE_REWARDS)
    return custom_rewards.find(rewards.weights, known, rewards.plugins, rewards.remote)


def kl_rules(stage: RLConfig) -> Rules:
    """What says how a KL is taken needs one; PPO's own setting may stand where there is none."""
    if stage.algorithm == "ppo" or stage.kl_coef > 0:
        return
    remedy = f"needs stage.kl_coef above 0 ({stage.loss=!s} may set it to 0)"
    if stage.kl_in != "loss":
        yield f"{stage.kl_in=!s} {remedy}"
    if stage.kl_estimator != "k3":
        yield f"{stage.kl_estimator=!s} {remedy}"


def group_rules(stage: RLConfig) -> Rules:
    """What compares the completions of a group means nothing where a value model judges each token."""
    if stage.loss != "grpo":
        yield (
            f"{stage.loss=!s} is for groups; with stage.algorithm=ppo give its parts as keys "
            "(stage.clip_high, stage.surrogate, stage.loss_aggregation)"
        )
    if stage.ratio != "token":
        yield f"{stage.ratio=!s} needs stage.algorithm=grpo: PPO's advantages are each token's"
    if stage.normalise_std:
        yield "stage.normalise_std=true needs stage.algorithm=grpo; PPO has stage.ppo.whiten"
    for key, alone in (("trained_per_group", None), ("max_sampling_batches", 1)):
        if getattr(stage, key) != alone:
            yield f"stage.{key}={getattr(stage, key)} needs stage.algorithm=grpo: PPO learns from all"


def ppo_rules(stage: RLConfig) -> Rules:
    ppo = stage.ppo
    if (ppo is not None) != (stage.algorithm == "ppo"):
        yield (
            f"{stage.algorithm=!s} {'needs' if ppo is None else 'takes no'} stage.ppo; "
            "say stage.algorithm=ppo and leave stage.ppo to it"
        )
    if ppo is None:
        return
    yield from group_rules(stage)
    if ppo.value_lr_factor == 0:
        yield "stage.ppo.value_lr_factor=0 would teach the value model nothing"
    if ppo.value_clip == 0:
        yield "stage.ppo.value_clip=0 would hold every value; give more, or null for none"
    if ppo.value_warmup_steps >= stage.max_steps:
        yield (
            f"stage.ppo.value_warmup_steps={ppo.value_warmup_steps} leaves none of {stage.max_steps=} to the "
            "policy"
        )


def tripwire_rules(tripwires: TripwiresConfig) -> Rules:
    for name in tripwires.wires:
        if name not in TRIPWIRES:
            yield f"tripwires.wires.{name} is no tripwire; {nearest(name, TRIPWIRES)}"
