"""Rejection sampling and SFT (R1 section 2.3.3): the base learns from what the RL checkpoint does best.

Draws several completions per prompt from the `grpo` checkpoint, keeps the correct and readable ones, joins
them with general data (R1: 600k and 200k) and fine-tunes the *base*, not the RL checkpoint, for two epochs.
Of R1's filters the kinds are published, not the thresholds. With judge=MODEL general prompts are sampled,
too, and answers kept of which the judge approves; without, the general data is written demonstrations alone.

    r1pipe run stage=rejection_sft
"""

import sys

from r1pipe.config import RejectionConfig
from r1pipe.core.errors import CheckpointError
from r1pipe.data.source import draw_prompts_that_fit, prompt_fits
from r1pipe.runs.record import Metrics
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.judging import open_judge, summary_of
from r1pipe.train.loading import load_weights
from r1pipe.train.run import open_run
from r1pipe.train.sft.judged import approved, general_prompts, kinds_of
from r1pipe.train.sft.loop import fine_tune
from r1pipe.train.sft.rejection import (
    GENERAL,
    build_dataset,
    draw_samples,
    drawn_in_order,
    evaluation_questions,
    read_dataset,
)


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
            asked = general_prompts(run) if stage.judge else []
            judge = open_judge(run, ranks, kinds_of(asked)) if asked else None
            shards = draw_samples(run, ranks, prompts)
            general_shards = draw_samples(run, ranks, asked, GENERAL) if asked else []
            run.sampler.forget()
        with run.phase("filtering"):
            if ranks.rank == 0:
                questions, general = evaluation_questions(run, context), None
                if judge:
                    samples = drawn_in_order(general_shards, stage.samples_per_prompt)
                    general = approved(run, judge, samples, questions)
                build_dataset(run, parent, shards, questions, too_long, general)
            ranks.barrier()
            demonstrations, data_hash = read_dataset(run.folder.dataset)
            extra: Metrics = {"judge": summary_of(run, ranks, judge)} if judge else {}
            if judge:
                judge.answerer.close()

        fine_tune(run, demonstrations, data_hash, extra)


if __name__ == "__main__":
    main(sys.argv[1])
