"""Answers in words: choices, yes and no, dates and times, ratios, short texts; each has its own equality."""

import re
from datetime import datetime
from fractions import Fraction

from r1pipe.rewards.answers import vocabulary

_LETTERS = re.compile(r"\(?[A-J]\)?(?:\s*(?:[,、;&/和与]|\band\b|\s)\s*\(?[A-J]\)?)*\.?")
_TOGETHER = re.compile(r"[A-J]{2,6}")
_LABEL = re.compile(r"^(?:option|choice|answer|选项|选择|选)\s*[:：]?\s*", re.IGNORECASE)
_OPTION = re.compile(
    r"\(?(?P<letter>[A-J])(?:\)[.:,]?|[.:,]|\s*(?=\s(?:because|since|as)\b|因为|$))\s*(?P<words>.*)",
    re.DOTALL,
)
# A second option in the words of the first; "A dog" and "vitamin C" are words.
_LETTER = r"\(?(?:[B-HJ]\b|[AI]\b(?! [a-z]))"
_ANOTHER = re.compile(
    rf"^(?:or|and)\b|^[或和与]|(?:^|[\n,;/&(或和与]|\b(?:or|and)\b)\s*{_LETTER}|(?<![\w.])[A-J][.:)](?:\s|$)"
)
_NEITHER = re.compile(r"^(?:neither|none)\b", re.IGNORECASE)
_MAX_OPTION = 500  # an option with its text; bounds the work too


def letters(text: str) -> set[str]:
    """The letters of a choice: "B", "(B)", "B. 12", "option B"; several where all are named: "A, C", "AC".

    Empty where it chooses none: "A or B", "I do not know", "A. Paris B. Rome".
    """
    if len(text) > _MAX_OPTION:
        return set()
    text = _LABEL.sub("", text).strip()
    if _LETTERS.fullmatch(text) or (_TOGETHER.fullmatch(text) and list(text) == sorted(set(text))):
        return set(re.findall(r"[A-J]", text))
    if re.fullmatch(r"\(?[a-j]\)?\.?", text):
        return {text.strip("().").upper()}
    option = _OPTION.fullmatch(text)
    if not option or (_ANOTHER.search(option["words"]) and not _NEITHER.match(option["words"])):
        return set()
    return {option["letter"]}


_TRUE = vocabulary.words("true")
_FALSE = vocabulary.words("false")


def truth(text: str) -> bool | None:
    """Yes or no, true or false; None where it is neither."""
    word = text.lower().strip(" .")
    return word in _TRUE if word in _TRUE | _FALSE else None


_FORMATS = (
    "%Y-%m-%d",
    "%Y/%m/%d",
    "%Y年%m月%d日",
    "%B %d, %Y",
    "%B %d %Y",
    "%d %B %Y",
    "%b %d, %Y",
    "%d %b %Y",
)
_DATE = re.compile(r"[A-Za-z]{3,9}\s+\d|\d+\s+[A-Za-z]{3}|\d{4}[-/年]")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*([ap])?\.?m?\.?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2})\s*([ap])\.?m\.?", re.IGNORECASE)
_SLASHED_DATE = re.compile(r"\d{1,2}[/.]\d{1,2}[/.]\d{4}")


def date(text: str) -> str | None:
    """A date or time of day in one spelling; 1/2/2024 may mean two days, and stays as it is."""
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text.strip(" ."))
    for form in _FORMATS if _DATE.match(text) else ():
        try:
            return datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    text = _HOUR.sub(r"\1:00 \2m", text) if _HOUR.fullmatch(text) else text
    if clock := _CLOCK.fullmatch(text):
        hour, minute, second, half = int(clock[1]), clock[2], clock[3] or "00", (clock[4] or "").lower()
        hour = hour % 12 + 12 * (half == "p") if half else hour
        return f"{hour}:{minute}:{second}" if hour < 24 and int(minute) < 60 else None
    return text if _SLASHED_DATE.fullmatch(text) else None


def ratio(text: str) -> str:
    """3:2 and 6:4 in one spelling; other texts as they are."""
    try:
        numbers = [Fraction(part) for part in re.split(r"\s*:\s*|\s+to\s+", text.strip())]
        return ":".join(str(number / numbers[-1]) for number in numbers) if len(numbers) > 1 else text
    except (ValueError, ZeroDivisionError):
        return text


_ARTICLE = re.compile(r"^(?:the|a|an)\s+", re.IGNORECASE)


def plain_words(text: str) -> str:
    """A short text for comparing: without case, punctuation, hyphens, blanks and a leading article."""
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", "", _ARTICLE.sub("", text.strip()))
    return re.sub(r"[^\w<>=+*/^|-]+|_", "", text.replace("%", " percent ").casefold())
