"""Distillation (R1 section 2.4): another base, the student, learns from stage 3's samples by SFT alone.

The samples are those that the pipeline's newest `rejection_sft` was trained on, general part included,
checked against the hash in its record. R1 gave its 800k samples to Qwen2.5 (1.5B to 32B) and Llama (8B, 70B).
The student is `parent=`, any checkpoint with the teacher's tokenizer and chat template, and `model=` its
shape; by default the pipeline's own base. For a smaller student first pre-train one, in a pipeline of its
own:

    r1pipe run stage=pretrain model=student pipeline=student
    r1pipe run stage=distill model=student parent=RUN_ID
"""

import sys

from r1pipe.config import DistillConfig
from r1pipe.core.errors import CheckpointError
from r1pipe.train.run import open_run
from r1pipe.train.sft.loop import fine_tune
from r1pipe.train.sft.rejection import samples_of


def main(folder: str) -> None:
    with open_run(folder, DistillConfig) as run:
        if len(run.config.reads_from) != 1:
            raise CheckpointError("this stage learns from one run's samples; name its stage in stage.reads")
        (teacher,) = run.config.reads_from.values()
        run.load_chat()
        with run.phase("loading data"):
            run.load_data()
            demonstrations, data_hash = samples_of(teacher)
        fine_tune(run, demonstrations, data_hash)


if __name__ == "__main__":
    main(sys.argv[1])
