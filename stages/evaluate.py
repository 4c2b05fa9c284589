"""Evaluates a checkpoint without training, and takes it into the pipeline.

Stage `base` is R1's DeepSeek-V3-Base: the pre-trained weights that later stages start from, and their scores
before any training.

    r1pipe run stage=base

With judge=MODEL a judge rates the answers to general prompts, and compares them with those of
stage.judge.baseline.
"""

import shutil
import sys
from pathlib import Path

from r1pipe.config import EvaluateConfig
from r1pipe.config.benchmark import task_of
from r1pipe.core.errors import CheckpointError
from r1pipe.runs import checkpoints
from r1pipe.runs.lineage.fit import template_of
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.finish import answer_dev_prompts, measure
from r1pipe.train.general_answers import check_answers, judge_answers
from r1pipe.train.loading import load_weights
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    with open_run(folder, EvaluateConfig) as run:
        parent = run.config.weights_from
        if parent is None:
            raise CheckpointError("this stage evaluates a checkpoint; name one with parent=CHECKPOINT")
        ranks = Ranks(run.config.engine)
        chat = run.load_chat()
        task, tasks = task_of(run.config.benchmark), None
        if task:
            # here, as lm-evaluation-harness need not be installed
            from r1pipe.lm_eval.measuring import find_task, measure_task

            tasks = find_task(run, task) if run.rank == 0 else None
        run.load_data()
        if run.stage.judge:
            check_answers(run)
        weights = load_weights(run, parent, ranks)
        checkpoint = run.folder.checkpoint(0)
        if run.rank == 0:
            checkpoints.verify(parent.checkpoint, parent.hash)
            source, begun = Path(parent.checkpoint), checkpoints.begin(checkpoint)
            checkpoints.copy_published(source, begun)
            if template_of(source) != chat.source:  # with another system prompt, or of an earlier version
                chat.save(source, begun)
            checkpoints.finish(checkpoint, run.launch.saving())
        answer_dev_prompts(run, ranks, weights, 0)
        with run.phase("evaluating"):
            if task:
                evaluation, data_hash = measure_task(run, ranks, weights, task, tasks)
            else:
                evaluation, data_hash = measure(run, ranks, weights, 0, run.stage.eval), None
        if run.stage.judge:
            with run.phase("judging"):
                evaluation.metrics["judged"] = judge_answers(run, ranks)
        measured, asked = evaluation.metrics, run.stage.eval.problems
        of_asked = f" of the {asked} problems requested" if asked else " problems"
        place = f"data={measured['data']}, split {measured['split']}"
        run.show(say=f"measured on {measured['problems']}{of_asked}, {place}")
        if said := measured.get("identity"):
            names = ", ".join(f"{name} {count}" for name, count in said["names"].items())
            run.show(
                say=f"asked {said['questions']} times who it is, it claims to be another model in "
                f"{said['other']:.0%} ({names or 'none'}) and gives its own name in {said['own']:.0%}"
            )
        run.finish(checkpoint, evaluation.metrics, evaluation.samples, data_hash)
        if run.rank == 0:  # evaluation.parquet has all of them
            shutil.rmtree(run.folder.drawn, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
