"""Control: SFT of the base on good worked solutions alone, for about as long as reinforcement takes.

Not a stage of R1. It shows what written solutions could have taught in the same time, so that nobody takes
for reinforcement's merit what good data would have done. It draws other solutions than the cold start does.

    r1pipe run stage=control_sft
    deepspeed --num_accelerators 2 --no_local_rank stages/control_sft.py RUN_FOLDER
"""

import sys

from r1pipe.config import SFTConfig
from r1pipe.train.run import open_run
from r1pipe.train.sft.finetune import fine_tune


def main(folder: str) -> None:
    with open_run(folder, SFTConfig) as run:
        stage = run.stage
        chat = run.load_chat()
        with run.phase("loading data"):
            source = run.load_data()
            demonstrations = source.demonstrations(
                stage.demonstrations, run.seed("control traces"), stage.styles, stage.correct_only
            )
        fine_tune(run, chat, source, demonstrations, source.hash)


if __name__ == "__main__":
    main(sys.argv[1])
