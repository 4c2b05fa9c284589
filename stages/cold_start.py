"""Cold start (R1 section 2.3.1): SFT of the base on long chains of thought in one readable format.

R1 collected thousands of them by prompting, from R1-Zero's outputs and by hand; here the data source writes
them (the bundled world) or brings them (files). The loss covers responses only, and packing leaks nothing.

    r1pipe run stage=cold_start
    deepspeed --num_accelerators 2 --no_local_rank stages/cold_start.py RUN_FOLDER
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
                stage.demonstrations, run.seed("traces"), stage.styles, stage.correct_only
            )
        fine_tune(run, chat, source, demonstrations, source.hash)


if __name__ == "__main__":
    main(sys.argv[1])
