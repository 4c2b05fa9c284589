"""R1's second stage, reasoning-oriented reinforcement learning (section 2.3.2), from the cold start.

Each step draws prompts, samples a group of completions for each, scores them by rule (accuracy + format +
language consistency, summed with weights), takes each one's advantage over its group, and updates the policy
on the clipped ratio with a KL to a reference inside the loss (GRPO). For comparison, stage.algorithm=ppo has
advantages over a value model's estimates instead. It differs from the paper in one thing: a step here is a
whole rollout batch (the paper counts its 16 minibatches). recipe=laptop says where its values differ, and
why.

    r1pipe run stage=grpo
    deepspeed --num_accelerators 2 --no_local_rank stages/grpo.py RUN_FOLDER
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
