"""R1's reinforcement learning, in three stages.

grpo (section 2.3.2), from the cold start: each step draws prompts, samples a group of completions for each,
scores them by rule (accuracy + format + language consistency, summed with weights), takes each one's
advantage over its group, and updates the policy on the clipped ratio with a KL to a reference inside the
loss. For comparison, stage.algorithm=ppo has advantages over a value model's estimates instead. It differs
from the paper in one thing: a step here is a whole rollout batch (the paper counts its 16 minibatches).

zero (R1-Zero, section 2.2), straight from the base: no written reasoning is learned from. Language
consistency is measured but weighs nothing, because R1-Zero's mixed languages are a finding. It differs from
the paper in the prompts' template: the base reads R1's chat format, without an instruction to think.

all_scenario (section 2.3.4), from the rejection-sampling SFT: in the last stage.preference.last_steps steps a
share of the prompts is general. A helpfulness model scores the summary alone, a harmlessness model the whole
response, and the rules format and language. Not earlier, because preference rewards get hacked. The shares
and weights were not published.

    r1pipe run stage=grpo
"""

import sys

from r1pipe.config import RLConfig
from r1pipe.train.rl.stage import run_rl_stage
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    with open_run(folder, RLConfig) as run:
        run_rl_stage(run)


if __name__ == "__main__":
    main(sys.argv[1])
