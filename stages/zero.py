"""R1-Zero (section 2.2): the same reinforcement learning as stage grpo, but straight from the base model.

No written reasoning is learned from. The rewards are accuracy and format with equal weight; language
consistency weighs nothing (conf/stage/zero.yaml) and is only measured, because R1-Zero's mixed languages are
a finding. It differs from the paper in the prompts' template: the base reads R1's chat format, without an
instruction to think.

    r1pipe run stage=zero
    deepspeed --num_accelerators 2 --no_local_rank stages/zero.py RUN_FOLDER
"""

import sys

from r1pipe.config import RLConfig
from r1pipe.train.rl.stage import reinforce, rules_only
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    with open_run(folder, RLConfig) as run:
        reinforce(run, rules_only)


if __name__ == "__main__":
    main(sys.argv[1])
