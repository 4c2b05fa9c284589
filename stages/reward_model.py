"""The reward models of R1's last stage (supplement): helpfulness from pairs, harmlessness from labels.

Each is the rejection-sampling SFT model with a score head in place of the vocabulary. The helpfulness model
learns from pairs (a better and a worse answer, Bradley-Terry) and reads the final summary alone; the
harmlessness model learns from responses labelled safe or unsafe (point-wise) and reads the whole response.
Both are evaluated on held-out examples before they are used. In the paper DeepSeek-V3 ranked the pairs; here
judge=MODEL does, and without it they are ranked in the data: those of the bundled world follow a hidden rule.

    r1pipe run stage=reward_model
"""

import gc
import sys
from itertools import accumulate

from r1pipe.config import RewardModelConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import PreferencePair
from r1pipe.runs.record import Metrics
from r1pipe.runs.reward_model_quality import KINDS, quality_of
from r1pipe.train import evaluation as evaluate
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.judging import open_judge, summary_of
from r1pipe.train.rl.reward_model import (
    note_trained_on,
    rank_by_judge,
    read_examples,
    steps_of,
    train_reward_model,
)
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    with open_run(folder, RewardModelConfig) as run:
        run.load_chat()
        run.load_data()
        ranks, judge = Ranks(run.config.engine), None
        ranked: list[PreferencePair] = []
        if run.stage.judge:
            judge = open_judge(run, ranks)
            with run.phase("judging"):
                ranked = rank_by_judge(run, ranks, judge)
        who = judge.identity.name_and_version if judge else None
        by_kind = [read_examples(run, kind, ranked, who) for kind in KINDS]
        trained = [examples for examples in by_kind if examples.learned]  # files have pairs only
        if not trained:
            raise DataError(
                f"data={run.config.data.name} has no preference pairs and no safety labels; choose other data"
            )
        note_trained_on(run, trained)
        steps = [steps_of(run.stage, examples) for examples in trained]
        firsts = [0, *accumulate(steps)]
        newest = run.newest_complete(ranks)  # earlier models than it has are finished
        started = [newest is not None and (newest / examples.kind).is_dir() for examples in trained]
        current = max(0, sum(started) - 1)
        for number in range(current, len(trained)):
            train_reward_model(run, trained[number], firsts[number], steps[number], resumes=number == current)
            gc.collect()  # DeepSpeed's engines are cycles: frees the model and its optimizer before the next
        checkpoint = run.folder.checkpoint(firsts[-1])
        run.saved()
        metrics: Metrics = {
            **evaluate.measure([], [], [], run.stage.eval),
            **evaluate.measure_general([], []),
            "reward_models": quality_of(checkpoint),
        }
        if judge:
            metrics["judge"] = summary_of(run, ranks, judge)
        run.finish(checkpoint, metrics, [])


if __name__ == "__main__":
    main(sys.argv[1])
