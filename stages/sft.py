"""Cold start (R1 section 2.3.1): SFT of the base on long chains of thought in one readable format.

R1 collected thousands of them by prompting, from R1-Zero's outputs and by hand; here the data source writes
them (the bundled world) or brings them (files). The loss covers responses only, and packing leaks nothing.

control_sft is the same on thorough, correct solutions alone, for about as long as reinforcement takes. It is
not a stage of R1: it shows what good data could have taught in the same time. It draws other solutions.

    r1pipe run stage=cold_start
"""

import sys

from r1pipe.config import SFTConfig
from r1pipe.train.run import open_run
from r1pipe.train.sft.loop import fine_tune

SEED_STREAMS = {"cold_start": "traces", "control_sft": "control traces"}


def main(folder: str) -> None:
    with open_run(folder, SFTConfig) as run:
        stage = run.stage
        run.load_chat()
        with run.phase("loading data"):
            source = run.load_data()
            seed = run.seed(SEED_STREAMS[stage.name])
            demonstrations = source.demonstrations(
                stage.demonstrations, seed, stage.styles, stage.correct_only
            )
        fine_tune(run, demonstrations, source.hash)


if __name__ == "__main__":
    main(sys.argv[1])
