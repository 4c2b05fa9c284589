"""Which of a summary's statements is the final answer, and what of its sentence is the value."""

import re

from r1pipe.rewards.answers import vocabulary, words
from r1pipe.rewards.answers.gold import Form, Gold, is_text
from r1pipe.rewards.answers.notation import tidy
from r1pipe.rewards.answers.number import read_number
from r1pipe.rewards.answers.statement import Statement, is_taken_back, statements
from r1pipe.rewards.answers.structure import parse

LOOKED_AT = 8000  # characters of a summary, its last ones; bounds the work on a hostile text
SEVERAL = (Form.LIST, Form.SET, Form.TUPLE, Form.INTERVAL, Form.CHOICE)  # may be spread over boxes
_BETWEEN_BOXES = re.compile(r"[,;&]?\s*(?:and|or|和|或|以及)?\s*(?:[A-Za-z](?:_\{?\w+\}?)?\s*=)?")

# What may stand before and behind a value in a sentence without changing it.
_BEFORE = re.compile(
    r"^(?:(?:(?:so|thus|therefore|hence)\s+)?(?:(?:the|my|our)\s+)?(?:(?:final|correct)\s+)?answer\s*(?:is\b|:|=)|not\s+\S+\s+but\s+|"
    rf"{vocabulary.any_of('before_a_value')}(?![a-z])|\\approx|[:=,])\s*",
    re.IGNORECASE,
)
_BEHIND = [
    re.compile(r",?\s+\(?(?:not|rather than|instead of)\s.*$|,?\s*而?不是.*$", re.IGNORECASE | re.DOTALL),
    re.compile(
        rf"(?:\s*[,;:—-]+\s*|\s){vocabulary.any_of('before_a_reason')}\s.*$|,?\s*(?:因为|由于|理由|即).*$",
        re.IGNORECASE | re.DOTALL,
    ),
    re.compile(r"\s*:\s*[A-Za-z一-鿿][^\d=]*$"),
    re.compile(r"\s+(?:long|wide|tall|high|deep|old|away|apart|in\s+(?:length|width|height|area|volume))$"),
    re.compile(r"\s*(?:です|である|だ|입니다|이다)$"),
]
_ANOTHER_VALUE = re.compile(r"\b(?:that\s+is|i\.e\.)[^\d]*\d", re.IGNORECASE)  # 10 pairs, that is 20
_NEGATIVE = re.compile(r"^(?:negative|minus)\s+(?=[\d.$])", re.IGNORECASE)
_REMARK = re.compile(r"\s+\((?P<or>or|或)?\s*(?P<text>[^()]*)\)$")
_REASON = re.compile(rf"{vocabulary.any_of('before_a_reason')}\b|[✓✔]|check", re.IGNORECASE)
HEDGES = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|might|either|not|n't|never|unsure|unknown|any|anything|other|but|"
    r"cannot|could|guess|between|except|wrong|incorrect|false|alternatively|otherwise)\b|\?|也许|可能|或许|大概是|不是|不确定|任意|其他|但|介于",
    re.IGNORECASE,
)
_OR = re.compile(r"\bor\b|或", re.IGNORECASE)
_LATEX = re.compile(r"[\\$]")


def final_answer(gold: Gold, summary: str) -> str | None:
    """The tidy text of the last statement that can be read in the gold answer's form; None without one.

    A box that is cut off ends the search: what was meant to be the answer is missing. Boxes that only a comma
    or "and" parts are one answer where the gold answer has several values.
    """
    summary = summary[-LOOKED_AT:]
    stated = statements(summary)
    if stated and not stated[-1].text:
        return None
    for last in range(len(stated) - 1, -1, -1):
        statement = stated[last]
        previous = stated[last - 1] if last and statement.boxed and stated[last - 1].boxed else None
        differ = previous and gold.form not in SEVERAL and tidy(previous.text) != tidy(statement.text)
        if previous and differ and _OR.search(_between(summary, previous, statement)):
            return None
        if gold.form in SEVERAL and statement.boxed:
            first = last
            while first and stated[first - 1].boxed and _are_one(summary, stated[first - 1], stated[first]):
                first -= 1
            contents = dict.fromkeys(box.text for box in stated[first : last + 1])
            statement = Statement(", ".join(contents), True, stated[first].start, statement.end)
        if answer := read_answer(gold, statement):
            return None if is_taken_back(summary, statement) else answer
    return None


def _are_one(summary: str, box: Statement, following: Statement) -> bool:
    return _BETWEEN_BOXES.fullmatch(_between(summary, box, following)) is not None


def _between(summary: str, box: Statement, following: Statement) -> str:
    return tidy(summary[box.end : following.start]).strip(" .$")


def last_stated(summary: str) -> str | None:
    """The last statement of any form: a sentence as tidy text, a box without LaTeX as it was written."""
    stated = statements(summary[-LOOKED_AT:])
    if not stated:
        return None
    last = stated[-1]
    if last.boxed and not _LATEX.search(last.text):
        return last.text or None  # a board or a grid: its lines and signs count
    return undress(tidy(last.text)) or None


def read_answer(gold: Gold, statement: Statement) -> str | None:
    """A statement's value as tidy text; None where a sentence has none of the gold answer's form."""
    text = undress(tidy(statement.text))
    if statement.boxed or not text:
        return text or None  # whatever a box holds is meant to be the answer
    readings = [*shortened(text), text]
    if gold.form is Form.TEXT:
        plain = words.plain_words(gold.text)
        return next((reading for reading in readings if words.plain_words(reading) == plain), readings[0])
    return next((reading for reading in readings if is_of_form(gold, reading)), None)


def undress(text: str) -> str:
    """A statement without words and signs that do not change its value."""
    text = _NEGATIVE.sub("-", text.strip(" ,;:*_").rstrip("."))
    if (remark := _REMARK.search(text)) and not HEDGES.search(remark["text"]):
        value = text[: remark.start()]
        if remark["or"]:
            text = f"{value} or {remark['text']}"
        elif is_text(remark["text"]) or _REASON.match(remark["text"]) or says_the_same(value, remark["text"]):
            text = value  # 5 (apples), 1/2 (50%), 42 (since 6 * 7 = 42)
    while (shorter := _BEFORE.sub("", text, count=1)) != text and shorter.strip(" .,"):
        text = shorter
    text = text.strip(" ,;:*_")
    if text[:1] in "\"'" or (text[-1:] == '"' and text.count('"') == 1):
        text = text.strip("\"'}")
    return _NEGATIVE.sub("-", text.rstrip("."))


def says_the_same(value: str, remark: str) -> bool:
    """Whether a number in brackets is about the value before it."""
    about = _BEFORE.sub("", remark, count=1).strip()
    numbers = read_number(value.strip()), read_number(about)
    if not numbers[0] or not numbers[1]:
        return numbers[1] is not None and parse(value.strip()) is not None  # a formula and its value
    one, other = (number.value / 100 if number.percent else number.value for number in numbers if number)
    return abs(one - other) * 100 <= abs(one)


def shortened(text: str) -> list[str]:
    """A sentence without a reason or remark behind its value, the shortest first.

    What takes the value back, such as "or 6", stays.
    """
    found: list[str] = []
    for number, pattern in enumerate(_BEHIND):
        match = pattern.search(text)
        if match is None or (number and (HEDGES.search(match[0]) or _OR.search(match[0]))):
            continue
        if _ANOTHER_VALUE.search(match[0]):
            continue
        text = text[: match.start()].strip(" ,;:")
        found.insert(0, text)
    return found


def is_of_form(gold: Gold, text: str) -> bool:
    """Whether a text can be read in the gold answer's form."""
    if gold.form is Form.CHOICE:
        return bool(words.letters(text)) or option_named(gold, text) is not None
    if gold.form is Form.BOOLEAN:
        return words.truth(text) is not None
    if gold.form in (Form.DATE, Form.RATIO):
        return True
    return not HEDGES.search(text) and not is_text(text) and parse(text) is not None


def option_named(gold: Gold, text: str) -> str | None:
    """The letter of the option whose text this is."""
    plain = words.plain_words(text)
    return next((letter for letter, option in gold.options if words.plain_words(option) == plain), None)
