"""What must be true of the values of a reinforcement learning stage."""

from r1pipe.config.architecture import Rules
from r1pipe.config.schema import RLConfig

# What r1pipe/rewards knows, which this wing cannot ask.
RULE_REWARDS = ("accuracy", "format", "language", "cosine", "overlong", "repetition")
# Rewards that are no rules: where each one's weight stands.
WEIGHED_ELSEWHERE = {
    "helpful": "stage.preference.helpful_weight",
    "harmless": "stage.preference.harmless_weight",
    "kl": "stage.kl_coef",
}


def rl_rules(stage: RLConfig, ranks: int) -> Rules:
    yield (
        stage.prompts_per_step % ranks == 0,
        f"stage.prompts_per_step={stage.prompts_per_step} must be a multiple of the {ranks} ranks "
        "(engine.ranks on each machine)",
    )
    outputs = stage.prompts_per_step * stage.group_size
    yield (
        outputs % (stage.minibatches * ranks) == 0,
        f"stage.prompts_per_step x stage.group_size = {outputs} must divide evenly into "
        f"stage.minibatches={stage.minibatches} on {ranks} ranks (engine.ranks on each machine)",
    )
    yield (
        stage.group_size >= 2 or stage.algorithm == "ppo",
        f"stage.group_size={stage.group_size}: advantages compare completions of one prompt; give 2 or more",
    )
    yield (
        stage.sampling.temperature > 0,
        "stage.sampling.temperature=0 draws a group of equals; it must be above 0",
    )
    # the ratio compares probabilities over the whole vocabulary: draws from a part of it would bias it
    yield (
        stage.sampling.top_p == 1,
        f"stage.sampling.top_p={stage.sampling.top_p:g}: reinforcement learns from the whole distribution; "
        "it must be 1",
    )
    yield from kl_rules(stage)
    yield from ppo_rules(stage)
    yield (
        stage.importance_cap == 0 or stage.importance_cap >= 1,
        f"stage.importance_cap={stage.importance_cap:g} would weigh down what is drawn as it should be; "
        "give 1 or more, or 0 for none",
    )
    yield stage.max_steps > 0, "stage.max_steps=0: prompts are endless; say how many"
    yield from weight_rules(stage)
    yield any(stage.rewards.weights.values()), "stage.rewards.weights are all 0; nothing would be learned"
    if stage.preference is not None:
        last = stage.preference.last_steps
        yield (
            last <= stage.max_steps,
            f"stage.preference.last_steps={last} is more than stage.max_steps={stage.max_steps}",
        )


def weight_rules(stage: RLConfig) -> Rules:
    """A weight of what no rule is would be refused after the first rollout, or count for nothing."""
    for name in stage.rewards.weights:
        elsewhere = WEIGHED_ELSEWHERE.get(name, "")
        if stage.preference is None and elsewhere.startswith("stage.preference"):
            elsewhere += " in stage=all_scenario, which asks reward models"
        remedy = f"its weight is {elsewhere}; rules" if elsewhere else "known"
        yield (
            name in RULE_REWARDS,
            f"stage.rewards.weights.{name} is no rule reward; {remedy}: {', '.join(RULE_REWARDS)}",
        )


def kl_rules(stage: RLConfig) -> Rules:
    """What says how a KL is taken needs one; PPO's own way of it may stand where there is none."""
    if stage.algorithm == "ppo":
        return
    yield (
        stage.kl_coef > 0 or stage.kl_in == "loss",
        f"stage.kl_in={stage.kl_in} needs stage.kl_coef above 0 (stage.loss={stage.loss} may set it to 0)",
    )
    yield (
        stage.kl_coef > 0 or stage.kl_estimator == "k3",
        f"stage.kl_estimator={stage.kl_estimator} needs stage.kl_coef above 0 "
        f"(stage.loss={stage.loss} may set it to 0)",
    )


def ppo_rules(stage: RLConfig) -> Rules:
    """What compares the completions of a group means nothing where a value model judges each token."""
    ppo = stage.ppo
    yield (
        (ppo is not None) == (stage.algorithm == "ppo"),
        f"stage.algorithm={stage.algorithm} {'needs' if ppo is None else 'takes no'} stage.ppo; "
        "say stage.algorithm=ppo and leave stage.ppo to it",
    )
    if ppo is None:
        return
    yield (
        stage.loss == "grpo",
        f"stage.loss={stage.loss} is for groups; with stage.algorithm=ppo give its parts as keys "
        "(stage.clip_high, stage.surrogate, stage.loss_aggregation)",
    )
    yield (
        stage.ratio == "token",
        f"stage.ratio={stage.ratio} needs stage.algorithm=grpo: PPO's advantages are each token's",
    )
    yield (
        not stage.normalise_std,
        "stage.normalise_std=true needs stage.algorithm=grpo; PPO has stage.ppo.whiten",
    )
    yield (
        stage.max_sampling_batches == 1,
        f"stage.max_sampling_batches={stage.max_sampling_batches} needs stage.algorithm=grpo: "
        "PPO learns from all",
    )
    for name, value in (("gamma", ppo.gamma), ("gae_lambda", ppo.gae_lambda)):
        yield value <= 1, f"stage.ppo.{name}={value:g} must be from 0 to 1"
    yield ppo.value_lr_factor > 0, "stage.ppo.value_lr_factor=0 would teach the value model nothing"
    yield ppo.value_clip != 0, "stage.ppo.value_clip=0 would hold every value; give more, or null for none"
    yield (
        ppo.value_warmup_steps < stage.max_steps,
        f"stage.ppo.value_warmup_steps={ppo.value_warmup_steps} leaves none of "
        f"stage.max_steps={stage.max_steps} to the policy",
    )
