"""Puts what a teacher has given into the student: `stage.transfer`, on the dataset of `stage.extract`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from r1pipe.config import DistillConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Demonstration, PreferencePair, Prompt
from r1pipe.runs import samples
from r1pipe.train.distill.divergence import learn_live, learn_stored, stored_examples
from r1pipe.train.distill.on_policy import reinforce_student
from r1pipe.train.distill.ranking import learn_ranking, pairs_of_texts, pairs_with_own
from r1pipe.train.extract.dataset import read_rows
from r1pipe.train.run import Run
from r1pipe.train.sft.loop import fine_tune, note_trained_on, screened
from r1pipe.train.sft.rejection import read_dataset


def transfer(run: Run[DistillConfig], dataset: Path, data_hash: str) -> None:
    """Train the student, from the dataset to the record; all ranks call. Raises DataError where the dataset
    has nothing to learn from, and CheckpointError where a teacher cannot read the student's tokens."""
    stage, rows = run.stage, read_dataset(dataset)[0]
    if stage.transfer != "sft":
        rows = noted(run, rows)
    match stage.transfer:
        case "sft":
            fine_tune(run, rows, data_hash)
        case "divergence" if stage.extract == "distribution" and not stage.distribution.live:
            learn_stored(run, stored_examples(run.chat, run.folder), data_hash)
        case "divergence":
            learn_live(run, rows, data_hash)
        case "rl":
            prompts = prompts_of(dataset, checked=stage.extract in ("label", "expand"))
            kept = {row.prompt.id for row in rows}
            reinforce_student(run, [prompt for prompt in prompts if prompt.id in kept], data_hash)
        case "ranking" if stage.extract == "feedback":
            pairs = pairs_of_texts(run.chat, pairs_by_score(dataset))
            learn_ranking(run, pairs, data_hash, by_teacher=stage.feedback.by == "correction")
        case "ranking":
            pairs = pairs_with_own(run, rows)
            learn_ranking(run, pairs, data_hash, by_teacher=True)


def noted(run: Run[DistillConfig], rows: Sequence[Demonstration]) -> list[Demonstration]:
    """The rows that screening leaves to teach the student; where each came from is written down."""
    rows = screened(run, rows)
    note_trained_on(run, rows, [len(run.chat.example(row.prompt, row.response).tokens) for row in rows])
    return rows


def prompts_of(dataset: Path, checked: bool) -> list[Prompt]:
    """The prompts of a dataset, each once; `checked`: those alone whose answers a rule can check. Raises
    DataError without any."""
    found: dict[str, Prompt] = {}
    for row in read_rows(dataset):
        checker = json.loads(row["checker"] or "{}")
        prompt = replace(samples.prompt_of(row), checker=checker, licence=row["licence"])
        if prompt.answer or prompt.checker or not checked:
            found.setdefault(prompt.id, prompt)
    if not found:
        raise DataError(
            "no prompt of the dataset has an answer that a rule can check: the teacher's answers do not "
            "agree, or are no numbers; give more stage.samples_per_prompt, or stage.extract=feedback"
        )
    return [*found.values()]


def pairs_by_score(dataset: Path) -> list[PreferencePair]:
    """Of each prompt's answers the best with the worst, the second with the second worst and so on, as long
    as their scores differ; a correction with the answer that it corrects. Raises DataError where no scores
    differ."""
    rows, pairs = read_rows(dataset), []

    def together(row: samples.Row) -> tuple[str, int]:
        return row["prompt_id"], -1 if row["pair"] is None else row["pair"]

    for _, group in groupby(sorted(rows, key=together), key=together):
        ranked = sorted(group, key=lambda row: -row["score"])
        for better, worse in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            if better["score"] > worse["score"]:
                pairs.append(PreferencePair(samples.prompt_of(better), better["response"], worse["response"]))
    if not pairs:
        raise DataError(
            f"no two answers to one prompt of {len(rows)} have different scores; give a larger "
            "stage.samples_per_prompt, or ask the teacher for other feedback (stage.feedback.by)"
        )
    return pairs
