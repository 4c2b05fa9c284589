"""The data: whether it can be read, its gold answers, duplicates, and overlap with the evaluation."""

from collections.abc import Iterable, Sequence

from r1pipe.config import DistillConfig, SFTConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Demonstration
from r1pipe.data.overlap import key, matches, user_text
from r1pipe.doctor.context import Context, Limits, Outcome
from r1pipe.rewards import check_gold
from r1pipe.runs.findings import FAIL, PASS, WARN

SHOWN = 60  # characters of a question


def readable(context: Context) -> Outcome:
    """Files, columns and rows. Raises DataError with file and line for what is wrong with them."""
    split = context.config.stage.eval.split
    trained = context.demonstrations or context.prompts
    value = f"data={context.config.data.name}: {_drawn(context, 'train', len(trained))} to train on, "
    value += f"{_drawn(context, split, len(context.held_out))} to evaluate on"
    value += "".join(f"; {line}" for line in context.data.layouts)
    if not context.held_out:
        return Outcome(WARN, value, f"add rows of split {split}, or nothing will be measured")
    if context.data_notes:
        remedy = "a run lists the rows that it sets aside in its data/set_aside.jsonl"
        if not context.data.files:
            remedy = "choose other tasks, levels or languages, or request fewer"
        return Outcome(WARN, f"{value}; {'; '.join(context.data_notes)}", remedy)
    return Outcome(PASS, value)


def _drawn(context: Context, split: str, count: int) -> str:
    rows = context.data.rows(split)
    return f"{count:,} rows" if rows is None else f"{count:,} of {len(rows):,} rows"


def gold_answers(context: Context) -> Outcome:
    """Whether any answer could ever match each gold answer."""
    prompts = [*context.prompts, *context.held_out]
    errors = []
    for prompt in prompts:
        try:
            check_gold(prompt)
        except DataError as error:
            errors.append(str(error))
    value = f"{len(prompts) - len(errors):,} of {len(prompts):,} parse"
    return Outcome(FAIL, value, errors[0]) if errors else Outcome(PASS, value)


def duplicates(context: Context) -> Outcome:
    """Rows with the same words as an earlier row, whatever the punctuation; see `data.overlap`."""
    training, tuned = context.training_rows, isinstance(context.config.stage, SFTConfig | DistillConfig)
    seen: set[tuple[str, str]] = set()
    repeated: list[Demonstration] = []
    for row in training.rows:
        same = (key(user_text(row.prompt)), key(row.response if tuned else ""))
        if same in seen:
            repeated.append(row)
        seen.add(same)
    share = len(repeated) / max(1, len(training.rows))
    value = f"{len(repeated):,} of {len(training.rows):,} {training.unit} ({share:.1%}){training.note}"
    remedy = "keep one of each in the data: "
    remedy += "repeated rows are learned repeatedly" if tuned else "there are fewer questions than rows"
    remedy += f"; the first: {_place_of(repeated[0])}" if repeated else ""
    return Outcome(context.limits.duplicates.grade(share), value, remedy)


def overlap(context: Context) -> Outcome:
    """Evaluation questions that training rows repeat: whole, or in files also nearly (`near_copies`).

    Questions made from templates with held-out numbers are alike by nature, so only whole ones count.
    """
    training, limits, split = context.training_rows, context.limits, context.config.stage.eval.split
    evaluation = context.row_set(split, context.held_out)
    questions = {key(user_text(row.prompt)): user_text(row.prompt) for row in evaluation.rows}
    whole = {same: row for row in training.rows if (same := key(user_text(row.prompt))) in questions}
    value = f"{len(whole):,} of {len(questions):,} evaluation questions are trained on "
    value += f"({len(training.rows):,} {training.unit})"
    near: dict[str, Demonstration] = {}
    if context.data.rows(split) is not None:
        keys = [same for same in questions if same not in whole]
        copies = near_copies([questions[same] for same in keys], training.rows, limits)
        near = {keys[number]: row for number, row in copies.items()}
        value += f", {len(near):,} more nearly, in {limits.covered:.0%} of their words"
    value += training.note or evaluation.note
    remedy = "take these rows out of the training data, or the evaluation measures memory"
    for same, row in [*whole.items(), *near.items()][:1]:
        remedy += f"; the first: {_place_of(row)}, evaluated as {questions[same][:SHOWN]!r}"
    status = FAIL if whole else limits.overlap.grade(len(near) / max(1, len(questions)))
    return Outcome(status, value, remedy)


def near_copies(
    questions: Sequence[str], rows: Iterable[Demonstration], limits: Limits
) -> dict[int, Demonstration]:
    """A question's index -> the first row that shares `covered` of its words; see `data.overlap.matches`."""
    copies: dict[int, Demonstration] = {}
    texts = ((user_text(row.prompt), row) for row in rows)
    for number, share, row in matches(questions, texts, limits.ngram, limits.common):
        if share >= limits.covered:
            copies.setdefault(number, row)
    return copies


def _place_of(row: Demonstration) -> str:
    """File and line of a row; its question where they are unknown."""
    return row.source or repr(row.prompt.question[:SHOWN])
