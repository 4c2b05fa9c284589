"""Gold answers in rows: a text, a list of alternatives, or the right one of several options.

An option is named by its letter (`B`), its index from 0, or its text; the gold answer is always the letter.
"""

import re
import string
from dataclasses import dataclass, field
from typing import Any

from r1pipe.core.errors import DataError
from r1pipe.data.columns import names, plain_text, text, value
from r1pipe.data.reading import Row
from r1pipe.rewards.answers.gold import read_gold
from r1pipe.rewards.programs.cases import loaded

LETTERS = string.ascii_uppercase
_LABEL = re.compile(r"\s*\(?([A-Za-z])\s*[.):、．：]\s*")  # "A) ", "(b) ", "C、"
_TEXTS = ("value", "text", "answer")  # where a struct holds the answer: TriviaQA, SQuAD
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
    is_single = "+" not in column and "|" not in column
    found = value(row, column) if is_single else text(row, column)
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
    if isinstance(found, dict) and (key := next((key for key in _TEXTS if key in found), None)):
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
    right = value(row, columns["answer"])
    several = [each for each in (right if isinstance(right, list) else [right]) if each not in (None, "")]
    if not several:
        return Answer("")
    chosen = sorted({_index(each, labels, texts, row, columns["answer"]) for each in several})
    letters = LETTERS[: len(texts)]
    answer = "".join(letters[i] for i in chosen)
    shown = "\n".join(f"{letter}. {each}" for letter, each in zip(letters, texts, strict=True))
    checker = {"options": dict(zip(letters, texts, strict=True)), "answer_form": "choice"}
    return Answer(answer, checker, shown)


def read_options(row: Row, columns: str) -> tuple[list[str], list[str]]:
    """Labels and texts, from a list of texts, a mapping, {label: [...], text: [...]}, or one column each.

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
    if len(labels) != len(texts):
        labels = list(LETTERS[: len(texts)])
    marks = [_LABEL.match(each) for each in texts]
    if all(mark and mark[1].upper() == letter for mark, letter in zip(marks, LETTERS, strict=False)):
        texts = [_LABEL.sub("", each, count=1) for each in texts]
    return [str(label).strip() for label in labels], texts


def _index(right: Any, labels: list[str], texts: list[str], row: Row, column: str) -> int:
    """Which option is right. Raises DataError where that is not told."""
    said = plain_text(right) if isinstance(right, str | int | float) else str(right)
    bare = said.strip("() .:")
    if bare.upper() in map(str.upper, labels):
        return [label.upper() for label in labels].index(bare.upper())
    by_text = [i for i, each in enumerate(texts) if each.casefold() == said.casefold()]
    by_index = int(bare) if bare.isdecimal() and len(bare) <= 2 else None
    place = f"{row.where}: the answer {said[:60]!r} (column {column})"
    if by_text and by_index is not None and by_index < len(texts) and by_text[0] != by_index:
        raise DataError(f"{place} is one option's text and another's index; write its letter")
    if by_text:
        return by_text[0]
    if by_index is not None and by_index < len(texts):
        return by_index
    if by_index is not None:
        raise DataError(f"{place} is no index of {len(texts)} options, counted from 0; write letters")
    label = _LABEL.match(said)  # "B. Paris"
    if label and label[1].upper() in labels and said[label.end() :] == texts[labels.index(label[1].upper())]:
        return labels.index(label[1].upper())
    raise DataError(f"{place} is none of the options' letters, indices and texts; correct it")


def shows_options(question: str, checker: dict[str, Any]) -> bool:
    """Whether a question lists its options itself."""
    options = checker.get("options", {})
    return all(
        re.search(rf"\b{key}\s*[.):、．：]\s*{re.escape(each)}", question) for key, each in options.items()
    )
