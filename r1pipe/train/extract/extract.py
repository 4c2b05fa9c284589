"""A distillation's dataset: made by asking the teacher, once, or taken from a run that has sampled."""

from collections.abc import Callable
from pathlib import Path

from r1pipe.config import DistillConfig
from r1pipe.core.errors import CheckpointError
from r1pipe.runs.checkpoints import file_hash
from r1pipe.runs.files import write_json
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.extract.curate import curate
from r1pipe.train.extract.dataset import write_dataset
from r1pipe.train.extract.distribution import distribution
from r1pipe.train.extract.expand import expand
from r1pipe.train.extract.feedback import feedback
from r1pipe.train.extract.label import label
from r1pipe.train.extract.stored import check_stored
from r1pipe.train.extract.teacher import TeacherGenerator
from r1pipe.train.extract.work import Found, Work
from r1pipe.train.run import Run
from r1pipe.train.sft.rejection import dataset_of, evaluation_questions

EXTRACTORS: dict[str, Callable[[Work], Found]] = {
    "label": label,
    "expand": expand,
    "curate": curate,
    "distribution": distribution,
    "feedback": feedback,
}


def extract(run: Run[DistillConfig], ranks: Ranks) -> tuple[Path, str]:
    """The dataset and its hash; all ranks call, with data and chat loaded.

    Without a teacher it is that of the one run in `stage.reads`. Raises CheckpointError where that is missing
    or changed, EnvironmentProblem where a server is lost (what it has answered is kept), and DataError where
    the filters leave nothing.
    """
    if run.config.teacher is None:
        if len(run.config.reads_from) != 1:
            raise CheckpointError(
                "this stage learns from one run's samples; name its stage in stage.reads, or give teacher="
            )
        (parent,) = run.config.reads_from.values()
        return dataset_of(parent)
    path = run.folder.dataset
    is_there = ranks.agree_max(int(path.exists())) > 0  # then the teacher need not be there any more
    if not is_there:
        make_dataset(run, ranks)
        ranks.barrier()
    elif ranks.rank == 0:
        check_stored(run.folder.distributions, path)
    return path, file_hash(path)


def make_dataset(run: Run[DistillConfig], ranks: Ranks) -> None:
    """Make the dataset."""
    teacher = TeacherGenerator(run, ranks)
    try:
        questions = evaluation_questions(run, run.config.model.max_position_embeddings)
        found = EXTRACTORS[run.stage.extract](Work(run, ranks, teacher, questions))
        if ranks.rank == 0:
            prompts = len({row.prompt.id for row in found.rows})
            write_json(run.folder.teacher, teacher.facts(prompts))
            write_dataset(run, found.rows, found.funnel)
    finally:
        teacher.close()
