"""What stages grpo, zero and all_scenario share: set up, train, finish."""

from pathlib import Path

from r1pipe.config import RLConfig
from r1pipe.config.changes import listed
from r1pipe.config.fields import check_all
from r1pipe.config.judge import REWARDS as JUDGE_REWARDS
from r1pipe.config.rl import rl_rules
from r1pipe.model.hf import HFModel
from r1pipe.rewards.custom import CustomRewards
from r1pipe.rewards.judge import Judge, JudgeReward
from r1pipe.rewards.models import RewardScorer, load_reward_model, open_empty, stored_parts
from r1pipe.runs import checkpoints
from r1pipe.runs import reward_model_quality as quality
from r1pipe.runs.provenance import note_rewards
from r1pipe.runs.record import Metrics
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.frozen import FrozenModel
from r1pipe.train.engine.ranks import Ranks, choose_device
from r1pipe.train.engine.sharded import fill_sharded
from r1pipe.train.finish import finish_stage
from r1pipe.train.judging import open_judge, summary_of
from r1pipe.train.loading import load_frozen, load_policy
from r1pipe.train.rl.base_reference import BaseReference
from r1pipe.train.rl.critic import Critic
from r1pipe.train.rl.loop import RLTrainer, TokenAdvantages
from r1pipe.train.rl.scoring import BatchScorer, RewardModels
from r1pipe.train.rl.update import Reference
from r1pipe.train.run import Run


def run_rl_stage(run: Run[RLConfig]) -> None:
    """A whole RL stage. Raises CheckpointError if a reward model is missing or, unless forced, weak."""
    stage = run.stage
    check_all(rl_rules(stage, run.world_size))  # a hostfile's machines times engine.ranks
    custom = load_custom_rewards(run)
    run.load_chat()
    run.load_data()
    reinforce(run, custom)


def reinforce(
    run: Run[RLConfig],
    custom: CustomRewards | None,
    teacher: TokenAdvantages | None = None,
    data_hash: str | None = None,
    scorer: BatchScorer | None = None,
) -> None:
    """From the loaded data to the record. `teacher` and `scorer` as RLTrainer's; `data_hash`: of the training
    data, if it is not the source's."""
    stage = run.stage
    # no gradient reaches MTP layers, and weight decay alone would shrink them
    policy = load_policy(run, freeze_mtp=True)
    weaknesses = quality.check_quality(run.config)
    if weaknesses:
        run.warn(f"reward models are used because of {quality.FORCE}, although {'; '.join(weaknesses)}")
    # without general prompts no neural reward: policies hack them in long runs (R1 section 2.2.2)
    rewards = load_reward_models(run) if stage.preference else {}
    judge = load_judge(run)
    if judge:
        rewards = {**rewards, **judge_rewards(stage, judge)}
    adapted = isinstance(policy, HFModel) and policy.adapter is not None  # the reference is the model below
    reference = None
    if stage.kl_coef and not adapted:
        like = load_frozen(run, run.config.weights_from, again=True)
        reference = Reference(like, run.config.engine)
    critic = Critic(load_policy(run, again=True), stage, stage.ppo, run.config.engine) if stage.ppo else None
    updates = stage.max_steps - (stage.ppo.value_warmup_steps if stage.ppo else 0)
    optimizer_steps = updates * stage.minibatches * stage.inner_epochs
    engine = Engine(policy, stage.optim, stage.router, run.config.engine, optimizer_steps)
    if stage.kl_coef and adapted:
        reference = BaseReference(engine)
    checkpoint = RLTrainer(run, engine, reference, rewards, critic, custom, teacher, scorer).train()
    if scorer:
        scorer.finish()
    known: Metrics = {}
    if stage.preference:  # for the record: the quality bounds that `force` overrode
        known = {"weak_judges": len(weaknesses), "forced_judges": weaknesses}
    if judge:
        known["judge"] = summary_of(run, engine, judge)
    finish_stage(run, engine, checkpoint, data_hash, extra=known)


def load_custom_rewards(run: Run[RLConfig]) -> CustomRewards | None:
    """The custom rewards, loaded and noted in the run folder; None where the stage has none.

    Raises ConfigError or EnvironmentProblem where one cannot be used.
    """
    custom = CustomRewards(run.stage.rewards, run.world_size * run.stage.max_sampling_batches)
    if not custom.names:
        return None
    custom.load()
    if run.rank == 0 and (changed := note_rewards(run.folder, custom.rewards)):
        run.warn(
            f"rewards have changed since this run's last session ({listed(changed)}); the steps before were "
            "scored by the old ones"
        )
    return custom


def load_judge(run: Run[RLConfig]) -> Judge | None:
    """The judge whose rewards have a weight; None without. Raises CheckpointError where it is too weak."""
    return open_judge(run, Ranks(run.config.engine)) if run.stage.judge and run.config.judge else None


def judge_rewards(stage: RLConfig, judge: Judge) -> dict[str, JudgeReward]:
    return {name: JudgeReward(judge, name) for name in JUDGE_REWARDS if stage.rewards.weights.get(name)}


def load_reward_models(run: Run[RLConfig]) -> RewardModels:
    """The frozen models of stage reward_model; check_quality has checked that those with a weight exist."""
    preference = run.stage.preference
    if preference and not quality.requested_kinds(preference) and quality.STAGE not in run.config.reads_from:
        return {}  # a judge alone
    parent = run.config.reads_from[quality.STAGE]
    checkpoints.verify(parent.checkpoint, parent.hash)
    engine, device = run.config.engine, choose_device(run.config.engine.accelerator)
    scorers: dict[str, RewardScorer] = {}
    for kind in quality.KINDS:
        folder = Path(parent.checkpoint) / kind
        if not folder.is_dir():
            continue
        if engine.zero_level < 3:
            scorers[kind] = RewardScorer(load_reward_model(folder).to(device), kind, run.chat)
            continue
        model, stored = open_empty(folder)
        fill_sharded(model, stored, engine, stored_parts(model))
        frozen = FrozenModel(model, engine)
        scorers[kind] = RewardScorer(frozen.module, kind, run.chat, frozen.evaluate)
    return scorers
