"""The data: whether it can be read, its gold answers, what stands in it twice, what the evaluation shares."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from r1pipe.config import DistillConfig, EvaluateConfig, SFTConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Demonstration
from r1pipe.doctor.context import Context, Limits, graded
from r1pipe.rewards import check_gold
from r1pipe.runs.findings import FAIL, PASS, WARN, Finding
from r1pipe.train.sft.filters import ngrams, words

SHOWN = 60  # characters of a question


def readable(context: Context, name: str) -> Finding:
    """Files, columns and rows: whatever is wrong with them raises DataError, with file and line."""
    learned = [] if isinstance(context.config.stage, EvaluateConfig) else context.prompts
    demonstrations, held_out = context.demonstrations, context.held_out
    drawn = len(demonstrations) or len(learned)
    shown = f"data={context.config.data.name}: {_of(context, 'train', drawn)} to train on, "
    shown += f"{_of(context, context.config.stage.eval.split, len(held_out))} to evaluate on, are drawn"
    if not held_out:
        split = context.config.stage.eval.split
        return Finding(name, WARN, shown, f"add rows of split {split}, or nothing will be measured")
    if context.data_notes:
        remedy = "a run lists the rows that it sets aside in its data/set_aside.jsonl"
        remedy = remedy if context.data.files else "choose other tasks, levels or languages, or ask for fewer"
        return Finding(name, WARN, f"{shown}; {'; '.join(context.data_notes)}", remedy)
    return Finding(name, PASS, shown)


def _of(context: Context, split: str, drawn: int) -> str:
    """How many problems are drawn, of how many where that is known."""
    rows = context.data.rows(split)
    return f"{drawn:,} rows" if rows is None else f"{drawn:,} of {len(rows):,} rows"


def gold_answers(context: Context, name: str) -> Finding:
    """Whether any answer could ever match each gold answer."""
    learned = [] if isinstance(context.config.stage, EvaluateConfig) else context.prompts
    looked_at = [*learned, *context.held_out]
    wrong = []
    for prompt in looked_at:
        try:
            check_gold(prompt)
        except DataError as error:
            wrong.append(str(error))
    shown = f"{len(looked_at) - len(wrong):,} of {len(looked_at):,} parse"
    return Finding(name, FAIL, shown, wrong[0]) if wrong else Finding(name, PASS, shown)


def duplicates(context: Context, name: str) -> Finding:
    """Rows whose words, whatever the signs between them, stood in an earlier row."""
    texts, tuned = context.learned_texts, isinstance(context.config.stage, SFTConfig | DistillConfig)
    seen: set[tuple[str, ...]] = set()
    again: list[Demonstration] = []
    for row in texts.rows:
        key = _key(row.prompt.question, row.response if tuned else "")
        if key in seen:
            again.append(row)
        seen.add(key)
    share = len(again) / max(1, len(texts.rows))
    shown = f"{len(again):,} of {len(texts.rows):,} {texts.kind} ({share:.1%}){texts.limit}"
    remedy = "leave one of each in the data: "
    remedy += "what stands there twice is learned twice" if tuned else "there are fewer questions than rows"
    remedy += f"; the first: {_told(again[0])}" if again else ""
    return graded(name, share, context.limits.duplicates, shown, remedy)


def overlap(context: Context, name: str) -> Finding:
    """Evaluation questions that training rows repeat: whole, or in files also nearly (`near_copies`).

    What is made of templates, and held out by its numbers, is alike by its nature.
    """
    texts, asked, limits = context.learned_texts, context.held_out_texts, context.limits
    questions = {_key(row.prompt.question): row.prompt.question for row in asked.rows}
    whole = {key: row for row in texts.rows if (key := _key(row.prompt.question)) in questions}
    shown = f"{len(whole):,} of {len(questions):,} evaluation questions are trained on "
    shown += f"({len(texts.rows):,} {texts.kind})"
    near: dict[tuple[str, ...], Demonstration] = {}
    if context.data.rows(context.config.stage.eval.split) is not None:
        keys = [key for key in questions if key not in whole]
        found = near_copies([questions[key] for key in keys], texts.rows, limits)
        near = {keys[i]: row for i, row in found.items()}
        shown += f", {len(near):,} more nearly, in {limits.covered:.0%} of their words"
    shown += texts.limit or asked.limit
    remedy = "take these rows out of the training data, or the evaluation measures memory"
    for key, row in [*whole.items(), *near.items()][:1]:
        remedy += f"; the first: {_told(row)}, asked as {questions[key][:SHOWN]!r}"
    if whole:
        return Finding(name, FAIL, shown, remedy)
    return graded(name, len(near) / max(1, len(questions)), limits.overlap, shown, remedy)


def near_copies(
    questions: Sequence[str], rows: Iterable[Demonstration], limits: Limits
) -> dict[int, Demonstration]:
    """Number of a question -> the first row that has `covered` of its words, in n-grams that both have.

    Words count that stand in some n-gram telling of the question: one that at most `common` questions have.
    """
    n = limits.ngram
    places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)  # (question, first word)
    for number, question in enumerate(questions):
        text = words(question)
        for first in range(len(text) - n + 1):
            places[tuple(text[first : first + n])].append((number, first))
    telling = {gram: found for gram, found in places.items() if len(found) <= limits.common}
    countable = _words_in(telling.values(), n)
    copies: dict[int, Demonstration] = {}
    for row in rows:
        shared = telling.keys() & ngrams(words(row.prompt.question), n)
        for number, found in _words_in((telling[gram] for gram in shared), n).items():
            if len(found) >= limits.covered * len(countable[number]):
                copies.setdefault(number, row)
    return copies


def _words_in(places: Iterable[list[tuple[int, int]]], n: int) -> dict[int, set[int]]:
    """Of each question, the words that its n-grams at these places hold."""
    held: dict[int, set[int]] = defaultdict(set)
    for found in places:
        for number, first in found:
            held[number].update(range(first, first + n))
    return held


def _told(row: Demonstration) -> str:
    """Where a row stands; its question where that is not known."""
    return row.source or repr(row.prompt.question[:SHOWN])


def _key(*texts: str) -> tuple[str, ...]:
    return tuple(" ".join(word for word in words(text) if word[0].isalnum()) for text in texts)
