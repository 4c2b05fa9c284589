"""Gold answers in rows: a text, a list of alternatives, or the right one of several options.

An option is named by its letter (`B`), its index from 0, or its text; the gold answer is always the letter.
"""

import random
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from r1pipe.core.errors import DataError
from r1pipe.data.columns import is_one, names, plain_text, text, value
from r1pipe.data.reading import Row
from r1pipe.rewards.answers.gold import read_gold
from r1pipe.rewards.programs.cases import loaded

LETTERS = string.ascii_uppercase
_LABEL = re.compile(r"\s*\(?([A-Za-z])\s*[.):、．：]\s*")  # "A) ", "(b) ", "C、"
IN_STRUCT = ("value", "text", "answer", "target")  # where it holds the answer: TriviaQA, SQuAD, Search-R1
_MORE = ("aliases", "alternatives")


@dataclass(frozen=True)
class Answer:
    """A gold answer, and what its check needs: the keys of Prompt.checker."""

    text: str
    checker: dict[str, Any] = field(default_factory=dict)
    options: str = ""  # the lines that show the options, for the question


def read_answer(row: Row, columns: dict[str, str]) -> Answer:
    """The answer of the roles `answer`, `alternatives` and `options`. Raises DataError."""
    if "options" in columns:
        return _choice(row, columns)
    column = columns["answer"]
    found = value(row, column) if is_one(column) else text(row, column)
    answers = _texts(found, row, column)
    if "alternatives" in columns:
        more = value(row, columns["alternatives"])
        answers += _texts(more if isinstance(more, list) else [more], row, columns["alternatives"])
    if not answers:
        return Answer("")
    others = [other for other in dict.fromkeys(answers[1:]) if other not in (answers[0], "")]
    usable = [other for other in others if _is_gold(other)]
    return Answer(answers[0], {"alternatives": usable} if usable else {})


def _texts(found: Any, row: Row, column: str) -> list[str]:
    """The answers that a column's content lists, the first first."""
    if found is None:
        return []
    if isinstance(found, bool):
        return [str(found).lower()]
    if isinstance(found, str) and found.lstrip().startswith('["'):
        several = loaded(found)  # verl has alternatives as JSON
        return [found.strip()] if isinstance(several, str) else _texts(several, row, column)
    if isinstance(found, str | int | float):
        return [plain_text(found)]
    if isinstance(found, list) and all(isinstance(each, str | int | float | None) for each in found):
        return [each for one in found for each in _texts(one, row, column)]
    if isinstance(found, dict) and (key := next((key for key in IN_STRUCT if key in found), None)):
        parts = [found[key], *(found[more] for more in _MORE if more in found)]
        return [each for part in parts for each in _texts(part, row, column)]
    kind = type(found).__name__
    raise DataError(f"{row.where}: column {column} holds a {kind}, not text; name another column")


def _is_gold(answer: str) -> bool:
    """Whether an alternative can be an answer: lists of aliases hold whole sentences, too."""
    try:
        return bool(read_gold(answer))
    except DataError:
        return False


def _choice(row: Row, columns: dict[str, str]) -> Answer:
    labels, texts = read_options(row, columns["options"])
    if columns["answer"] in names(columns["options"]):
        return _reordered(row, columns, texts)
    right = value(row, columns["answer"])
    several = [each for each in (right if isinstance(right, list) else [right]) if each not in (None, "")]
    if not several:
        return Answer("")
    chosen = sorted({_index(each, labels, texts, row, columns["answer"]) for each in several})
    letters = LETTERS[: len(texts)]
    return _shown("".join(letters[i] for i in chosen), texts)


def _reordered(row: Row, columns: dict[str, str], texts: list[str]) -> Answer:
    """Of options in columns of their own, of which one is that of the right answer (GPQA): in an order that
    the question alone decides, or the answer would always be the same letter. Raises DataError."""
    if len(texts) != len(names(columns["options"])):
        raise DataError(f"{row.where}: an option of {columns['options']} is empty; fill it in")
    right = names(columns["options"]).index(columns["answer"])
    order = random.Random(text(row, columns["question"])).sample(range(len(texts)), len(texts))
    return _shown(LETTERS[order.index(right)], [texts[i] for i in order])


def _shown(answer: str, texts: list[str]) -> Answer:
    """The letters of the right options among `texts`, which are listed under A, B, ..."""
    options = dict(zip(LETTERS, texts, strict=False))
    return Answer(answer, {"options": options, "answer_form": "choice"}, listed(options))


def listed(options: Mapping[str, str]) -> str:
    """The lines that a question shows its options in."""
    return "\n".join(f"{letter}. {each}" for letter, each in options.items())


def read_options(row: Row, columns: str) -> tuple[list[str], list[str]]:
    """Labels (none: letters) and texts, from a list of texts, a mapping, {label: [...], text: [...]}, or one
    column each.

    Raises DataError where there are fewer than two.
    """
    several = names(columns)
    found = loaded(value(row, columns)) if len(several) == 1 else None  # a csv file has it as text
    if len(several) > 1:
        found = {letter: value(row, name) for letter, name in zip(LETTERS, several, strict=False)}
    labels: list[Any] = []
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        labels, found = found.get("label") or [], found["text"]
    elif isinstance(found, dict):
        given = {label: each for label, each in found.items() if each not in (None, "")}
        labels, found = list(given), list(given.values())
    if not isinstance(found, list) or not 2 <= len(found) <= len(LETTERS):
        raise DataError(f"{row.where}: column {columns} holds no list of options; correct it")
    if not all(isinstance(each, str | int | float) for each in found):
        raise DataError(f"{row.where}: column {columns} holds an option that is no text; correct it")
    texts = [plain_text(each) for each in found]
    labels = labels if len(labels) == len(texts) else []
    marks = [_LABEL.match(each) for each in texts]
    if all(mark and mark[1].upper() == letter for mark, letter in zip(marks, LETTERS, strict=False)):
        texts = [_LABEL.sub("", each, count=1) for each in texts]
    return [str(label).strip() for label in labels], texts


def _index(right: Any, labels: list[str], texts: list[str], row: Row, column: str) -> int:
    """Which option is right. Raises DataError where that is not known."""
    said = plain_text(right) if isinstance(right, str | int | float) else str(right)
    bare = said.strip("() .:")
    upper = [label.upper() for label in labels] or [*LETTERS[: len(texts)]]
    by_text = [i for i, each in enumerate(texts) if each.casefold() == said.casefold()]
    by_index = int(bare) if bare.isdecimal() and len(bare) <= 2 else None
    place = f"{row.where}: the answer {said[:60]!r} (column {column})"
    if bare.upper() in upper:
        by_letter = upper.index(bare.upper())
        if not labels and by_text and by_letter not in by_text:
            raise DataError(
                f"{place} is one option's letter and another's text; give the options as {{A: TEXT, ...}}"
            )
        return by_letter
    if by_index is not None and LETTERS[by_index : by_index + 1] in upper:
        by_index = upper.index(LETTERS[by_index])  # not shifted by an empty option before it
    if by_text and by_index is not None and by_index < len(texts) and by_text[0] != by_index:
        raise DataError(f"{place} is one option's text and another's index; write its letter")
    if by_text:
        return by_text[0]
    if by_index is not None and by_index < len(texts):
        return by_index
    if by_index is not None:
        raise DataError(f"{place} is no index of {len(texts)} options, counted from 0; write letters")
    label = _LABEL.match(said)  # "B. Paris"
    if label and label[1].upper() in upper and said[label.end() :] == texts[upper.index(label[1].upper())]:
        return upper.index(label[1].upper())
    raise DataError(f"{place} is none of the options' letters, indices and texts; correct it")


def shows_options(question: str, checker: dict[str, Any]) -> bool:
    """Whether a question lists its options itself."""
    options = checker.get("options", {})
    return all(
        re.search(rf"\b{key}\s*[.):、．：]\s*{re.escape(each)}", question) for key, each in options.items()
    )
