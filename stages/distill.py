"""Distillation (R1 section 2.4): a student learns from a teacher.

First what is got out of the teacher, `stage.extract`: its answers to given prompts (label), to new problems
(expand), on topics or documents (curate), its probabilities (distribution), or its judgement of the student's
answers (feedback). Then what puts it into the student, `stage.transfer`. R1 gave 800k samples of stage 3 to
Qwen2.5 (1.5B to 32B) and Llama (8B, 70B) by SFT alone: so it is without `teacher=`, where the samples are
those that the pipeline's newest `rejection_sft` was trained on, checked against the hash in its record.

The student is `parent=`, any checkpoint with `model=` its shape; by default the pipeline's own base. For a
smaller student first pre-train one, in a pipeline of its own:

    r1pipe run stage=pretrain model=student pipeline=student
    r1pipe run stage=distill model=student parent=RUN_ID
    r1pipe run stage=distill model=student parent=RUN_ID teacher=grpo stage.extract=distribution
"""

import sys

from r1pipe.config import DistillConfig
from r1pipe.train.distill.transfer import transfer
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.extract.extract import extract
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    with open_run(folder, DistillConfig) as run:
        ranks = Ranks(run.config.engine)
        run.load_chat()
        with run.phase("loading data"):
            run.load_data()
        with run.phase("extracting"):
            dataset, data_hash = extract(run, ranks)
        transfer(run, dataset, data_hash)


if __name__ == "__main__":
    main(sys.argv[1])
