"""R1's last stage, reinforcement learning for all scenarios (section 2.3.4), from the rejection-sampling SFT.

Reasoning prompts earn rule rewards throughout. In the last steps (`stage.preference.last_steps`) a share of
the prompts is general: a helpfulness model judges the summary alone, a harmlessness model the whole response,
and the rules judge format and language. Not earlier, because preference rewards get hacked. It differs from
the paper in the shares and weights, which were not published.

    r1pipe run stage=all_scenario
    deepspeed --num_accelerators 2 --no_local_rank stages/all_scenario.py RUN_FOLDER
"""

import sys

from r1pipe.config import RLConfig
from r1pipe.train.rl.stage import reinforce, reward_models
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    with open_run(folder, RLConfig) as run:
        reinforce(run, reward_models)


if __name__ == "__main__":
    main(sys.argv[1])
