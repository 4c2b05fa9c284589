"""Evaluates a checkpoint without training, and takes it into the pipeline.

Stage `base` is R1's DeepSeek-V3-Base: the pre-trained weights that later stages start from, and their scores
before any training.

    r1pipe run stage=base

With judge=MODEL a judge rates the answers to general prompts, and compares them with those of
stage.judge.baseline.
"""

import sys
from pathlib import Path

from r1pipe.config import EvaluateConfig
from r1pipe.core.errors import CheckpointError
from r1pipe.runs import checkpoints
from r1pipe.runs.lineage.fit import template_of
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.finish import measure
from r1pipe.train.general_answers import judge_answers
from r1pipe.train.loading import load_weights
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    with open_run(folder, EvaluateConfig) as run:
        parent = run.config.weights_from
        if parent is None:
            raise CheckpointError("this stage evaluates a checkpoint; name one with parent=CHECKPOINT")
        ranks = Ranks(run.config.engine)
        chat = run.load_chat()
        run.load_data()
        weights = load_weights(run, parent, ranks)
        checkpoint = run.folder.checkpoint(0)
        if run.rank == 0:
            checkpoints.verify(parent.checkpoint, parent.hash)
            source, begun = Path(parent.checkpoint), checkpoints.begin(checkpoint)
            checkpoints.copy_published(source, begun)
            if template_of(source) != chat.source:  # with another system prompt, or of an earlier version
                chat.save(source, begun)
            checkpoints.finish(checkpoint, run.launch.saving())
        with run.phase("evaluating"):
            evaluation = measure(run, ranks, weights, 0, run.stage.eval)
        if run.stage.judge:
            with run.phase("judging"):
                evaluation.metrics["judged"] = judge_answers(run, ranks)
        measured = evaluation.metrics
        run.show(
            say=f"measured on {measured['problems']} of the {run.stage.eval.problems} problems requested, "
            f"data={measured['data']}, split {measured['split']}"
        )
        run.finish(checkpoint, evaluation.metrics, evaluation.samples)


if __name__ == "__main__":
    main(sys.argv[1])
