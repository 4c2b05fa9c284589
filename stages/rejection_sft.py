"""Rejection sampling and SFT (R1 section 2.3.3): the base learns from what the RL checkpoint does best.

Draws several completions per prompt from the `grpo` checkpoint, keeps the correct and readable ones, joins
them with general data (R1: 600k and 200k) and fine-tunes the *base*, not the RL checkpoint, for two epochs.
Of R1's filters the kinds are published, not the thresholds; its judge model for some of the data is left out.

    r1pipe run stage=rejection_sft
"""

import sys

from r1pipe.config import RejectionConfig
from r1pipe.core.errors import CheckpointError
from r1pipe.data.source import draw_prompts_that_fit, prompt_fits
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.loading import load_weights
from r1pipe.train.run import open_run
from r1pipe.train.sft.loop import fine_tune
from r1pipe.train.sft.rejection import build_dataset, draw_samples, evaluation_questions, read_dataset


def main(folder: str) -> None:
    with open_run(folder, RejectionConfig) as run:
        stage = run.stage
        if len(run.config.reads_from) != 1:
            raise CheckpointError("this stage samples from one checkpoint; name its stage in stage.reads")
        (parent,) = run.config.reads_from.values()
        ranks = Ranks(run.config.engine)
        chat, source = run.load_chat(), run.load_data()

        with run.phase("sampling"):
            run.sampler.update(load_weights(run, parent, ranks), 0)
            context = run.config.model.max_position_embeddings
            prompts, too_long = draw_prompts_that_fit(
                lambda n: source.prompts("train", n, run.seed("prompts")),
                stage.prompts,
                prompt_fits(chat, context, stage.sampling.max_tokens),
            )
            shards = draw_samples(run, ranks, prompts)
            run.sampler.forget()
        with run.phase("filtering"):
            if ranks.rank == 0:
                questions = evaluation_questions(run, context)
                build_dataset(run, parent, shards, questions, too_long)
            ranks.barrier()
            demonstrations, data_hash = read_dataset(run.folder.dataset)

        fine_tune(run, demonstrations, data_hash)


if __name__ == "__main__":
    main(sys.argv[1])
