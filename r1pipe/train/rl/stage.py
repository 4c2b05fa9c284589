"""What the scripts of grpo, zero and all_scenario have in common: set up, train, conclude."""

from collections.abc import Callable
from pathlib import Path

from r1pipe.chat.template import Chat
from r1pipe.config import RLConfig
from r1pipe.config.fields import check_all
from r1pipe.config.rl import rl_rules
from r1pipe.rewards.models import RewardScorer, load_reward_model
from r1pipe.runs import checkpoints
from r1pipe.runs import reward_model_quality as judges
from r1pipe.runs.record import Metrics
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import choose_device
from r1pipe.train.finish import finish_stage, quick_evaluation
from r1pipe.train.rl.critic import Critic
from r1pipe.train.rl.loop import GRPO
from r1pipe.train.rl.scoring import Judges
from r1pipe.train.rl.update import Reference
from r1pipe.train.run import Run


def reinforce(run: Run[RLConfig], load_judges: Callable[[Run[RLConfig], Chat], Judges]) -> None:
    """A whole RL stage. `load_judges` gives the rewards, besides the rules, that general prompts earn.

    Raises CheckpointError where a reward model which is asked is missing or, unless forced, weak.
    """
    stage = run.stage
    check_all(rl_rules(stage, run.world_size))  # a hostfile's machines times engine.ranks
    chat, data = run.load_chat(), run.load_data()
    policy = run.load_model(run.config.weights_from)
    policy.freeze_mtp()  # no gradient reaches them here, and weight decay alone would wear them down
    for weakness in judges.check_quality(run.config):
        run.warn(f"weak reward model, used because {judges.FORCE}: {weakness}")
    asked = load_judges(run, chat)
    reference = Reference(policy, run.config.engine) if stage.kl_coef else None
    critic = Critic(policy, stage, stage.ppo, run.config.engine) if stage.ppo else None
    updates = stage.max_steps - (stage.ppo.value_warmup_steps if stage.ppo else 0)
    optimizer_steps = updates * stage.minibatches * stage.inner_epochs
    engine = Engine(policy, stage.optim, stage.router, run.config.engine, optimizer_steps)

    def evaluate_quickly() -> dict[str, float]:
        return quick_evaluation(run, engine, chat, data)

    loop = GRPO(run, engine, reference, chat, data, asked, evaluate_quickly, critic)
    checkpoint = loop.train()
    finish_stage(run, engine, chat, data, checkpoint, stage.max_steps, known=weaknesses_for_record(run))


def weaknesses_for_record(run: Run[RLConfig]) -> Metrics:
    """For the record of a stage that asks reward models: which of their bounds were forced, and how many."""
    if not run.stage.preference:
        return {}
    forced = judges.weaknesses(run.config)
    return {"weak_judges": len(forced), "forced_judges": forced}


def rules_only(run: Run[RLConfig], chat: Chat) -> Judges:
    """No neural reward: they get hacked in long runs, and must be retrained (R1 section 2.2.2)."""
    return {}


def reward_models(run: Run[RLConfig], chat: Chat) -> Judges:
    """The frozen models that stage reward_model made; those whose reward weighs something are all there
    (judges.check_quality)."""
    parent = run.config.reads_from[judges.STAGE]
    checkpoints.verify(parent.checkpoint, parent.hash)
    device = choose_device(run.config.engine.accelerator)
    models = {
        kind: load_reward_model(Path(parent.checkpoint) / kind).to(device)
        for kind in judges.KINDS
        if (Path(parent.checkpoint) / kind).is_dir()
    }
    return {kind: RewardScorer(model, kind, chat) for kind, model in models.items()}
