"""R1's last stage, reinforcement learning for all scenarios (section 2.3.4), from the rejection-sampling SFT.

Reasoning prompts earn rule rewards throughout. In the last steps (`stage.preference.last_steps`) a share of
the prompts is general: a helpfulness model judges the summary alone, a harmlessness model the whole response,
and the rules judge format and language. Not earlier, because preference rewards get hacked. It differs from
the paper in the shares and weights, which were not published.

    r1pipe run stage=all_scenario
    deepspeed --num_accelerators 2 --no_local_rank stages/all_scenario.py RUN_FOLDER
"""

import sys
from pathlib import Path

from r1pipe import checkpoints
from r1pipe.config.schema import RLConfig
from r1pipe.data.chat import Chat
from r1pipe.judges import FORCE, KINDS, STAGE, must_be_good
from r1pipe.ranks import choose_device
from r1pipe.rewards.models import Judge, load_reward_model
from r1pipe.rl.scoring import Judges
from r1pipe.rl.stage import reinforce
from r1pipe.run import Run, open_run


def main(folder: str) -> None:
    with open_run(folder, RLConfig) as run:
        reinforce(run, reward_models)


def reward_models(run: Run[RLConfig], chat: Chat) -> Judges:
    """The frozen models that stage reward_model made: those that its data had examples for.

    Raises CheckpointError where one is too weak to be asked (conf/stage/all_scenario.yaml), unless forced.
    """
    parent = run.config.reads_from[STAGE]
    checkpoints.verify(parent.checkpoint, parent.hash)
    for weakness in must_be_good(run.config):
        run.warn(f"weak reward model, used because {FORCE}: {weakness}")
    device = choose_device(run.config.engine.accelerator)
    models = {
        kind: load_reward_model(Path(parent.checkpoint) / kind).to(device)
        for kind in KINDS
        if (Path(parent.checkpoint) / kind).is_dir()
    }
    return {kind: Judge(model, kind, chat) for kind, model in models.items()}


if __name__ == "__main__":
    main(sys.argv[1])
