"""Answers in words: choices, yes and no, dates and times, ratios, short texts; each has its own equality."""

import re
from datetime import datetime
from fractions import Fraction

from r1pipe.rewards.answers import vocabulary

_LETTERS = re.compile(
    r"[(\[]?[A-J][)\]]?(?:\s*(?:[,、;&/和与]\s*(?:and\b)?|\band\b|\s|(?<=\))(?=\())\s*[(\[]?[A-J][)\]]?)*\.?"
)
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


# yes, it converges
_FIRST_WORD = re.compile(r"(?:yes|no|true|false|是的?|否|对|错)(?=\s*[,，])|.*", re.DOTALL)


def truth(text: str) -> bool | None:
    """Yes or no, true or false; None where it is neither."""
    match = _FIRST_WORD.match(text.lower().strip(" ."))
    word = match[0] if match else ""
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
    "%B %d",  # of any year
    "%d %B",
)
_DATE = re.compile(r"[A-Za-z]{3,9}\s+\d|\d+\s+[A-Za-z]{3}|\d{4}[-/年]")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*([ap])?\.?m?\.?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2})\s*([ap])\.?m\.?", re.IGNORECASE)
_SLASHED_DATE = re.compile(r"\d{1,2}[/.]\d{1,2}[/.]\d{4}")


_CHINESE_TIME = re.compile(
    r"(?P<half>上午|早上|早晨|凌晨|中午|下午|晚上|傍晚)?\s*(?P<hour>\d{1,2})\s*(?P<mark>[点时:])\s*"
    r"(?P<minute>\d{1,2}|半|整)?\s*分?"
)


def _clock(match: re.Match[str]) -> str:
    """上午9点20分 as 9:20 am; what may be a number of hours stays."""
    if match["half"] is None and match["mark"] != "点" and not (match["mark"] == "时" and match["minute"]):
        return match[0]
    minute = {"半": "30", "整": "00", None: "00"}.get(match["minute"], match["minute"])
    half = "pm" if match["half"] in ("中午", "下午", "晚上", "傍晚") else "am" if match["half"] else ""
    return f"{match['hour']}:{minute:0>2} {half}".strip()


def date(text: str) -> str | None:
    """A date or time of day in one spelling; 1/2/2024 may mean two days, and stays as it is."""
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text.strip(" ."))
    text = _CHINESE_TIME.sub(_clock, text)
    for form in _FORMATS if _DATE.match(text) else ():
        try:
            year = "" if "%Y" in form else " 2000"
            return datetime.strptime(text + year, form + " %Y" * bool(year)).date().isoformat()
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
        text = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1:\2", text)
        text = re.sub(r"^(\d+)\s*/\s*(\d+)$", r"\1:\2", text)
        numbers = [Fraction(part) for part in re.split(r"\s*[:比]\s*|\s+to\s+", text.strip())]
        return ":".join(str(number / numbers[-1]) for number in numbers) if len(numbers) > 1 else text
    except (ValueError, ZeroDivisionError):
        return text


_SYNONYMS = vocabulary.synonyms()
_ARTICLE = re.compile(r"^(?:the|a|an)\s+", re.IGNORECASE)


def plain_words(text: str) -> str:
    """A short text for comparing: without case, punctuation, hyphens, blanks and a leading article."""
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", "", _ARTICLE.sub("", text.strip()))
    text = re.sub(r"\s+and\s+", ", ", text, flags=re.IGNORECASE)
    plain = re.sub(r"[^\w<>=+*/^|-]+|_", "", text.replace("%", " percent ").casefold())
    return _SYNONYMS.get(plain, re.sub("^(?:星期|礼拜)(?=.$)", "周", plain))
