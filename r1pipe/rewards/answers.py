"""Final answers: where a summary states one, which number it is, and how two are compared exactly.

Everything here is plain text and `Fraction`: thousands of answers a second. What is not a plain number
(LaTeX, intervals, sets, algebra) goes to `symbolic.py`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

# The last mark wins: a summary may talk about answers before it gives one.
_MARK = re.compile(r"####|\banswer(?:\s+is|\s*[:：=])|答案(?:是|为|[:：])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|。|(?<!\\)[.!?;](?=\s|$)|[；！？]")  # \! and \; are LaTeX's spaces
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: "-", 0x3000: " "}

_NUMBER = r"(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<decimals>\.\d+)?"
_SLASHED = r"(?:\s*/\s*(?P<below>\d+))?"
_LATEX_FRACTION = r"\\[dt]?frac\s*\{?(?P<top>-?\d+)\}?\s*\{?(?P<bottom>\d+)\}?"
_UNIT = r"(?P<gap>\s*)(?P<unit>(?:[^\W\d_]|°)[^\d_=+*/^\\(){}]*)?"
_VALUE = rf"(?:{_LATEX_FRACTION}|{_NUMBER}{_SLASHED})(?:\s?(?P<percent>%))?"
_PLAIN = re.compile(rf"(?P<sign>[+-]?)\s*{_VALUE}{_UNIT}")
_CURRENCY = re.compile(r"^([+-]?)\s*(?:US)?[$€£¥]\s*")

_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12,
    "百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8,
}  # fmt: skip
# Words that would change the number, so that "3 and a half" is not taken for 3.
_NOT_UNITS = {"and", "or", "to", "pi", "half", "quarter", "sqrt", "root", "times", *"半又或至"}
_GLUED_UNITS = re.compile(r"(?:[mck]?m|[mk]?g|ml|[lhs]|min|ft|in|lbs?|oz|mph|am|pm|usd|rmb)\b", re.IGNORECASE)
_MAX_LENGTH = 60  # a plain number with its unit is shorter; also bounds the work on a hostile answer
_MAX_UNIT_WORDS = 4
_MAX_OPTION = 500  # an option with its text; bounds the work too

_LETTERS = re.compile(r"\(?[A-J]\)?(?:\s*(?:[,、;&和与]|\band\b|\s)\s*\(?[A-J]\)?)*\.?")
_OPTION = re.compile(r"\(?(?P<letter>[A-J])(?:\)[.:、,]?|[.:、,])\s*(?P<words>.*)", re.DOTALL)
# A second option in the words of the first; "A dog" and "vitamin C" are words.
_LETTER = r"\(?(?:[B-HJ]\b|[AI]\b(?! [a-z]))"
_ANOTHER = re.compile(
    rf"^(?:or|and)\b|^[或和与]|(?:^|[\n,;/&(、或和与]|\b(?:or|and)\b)\s*{_LETTER}|(?<![\w.])[A-J][.:)](?:\s|$)"
)


@dataclass(frozen=True)
class Number:
    """A plain number as it was written: its value, whether it had a percent sign, its unit."""

    value: Fraction
    percent: bool = False
    unit: str = ""
    rounded: bool = False  # written with decimals


# A file may write a LaTeX command with one backslash, which JSON takes for an escape: x \neq 0.
_ESCAPED = {"\n": "n", "\t": "t", "\f": "f", "\r": "r", "\b": "b"}
_DAMAGED = re.compile("[\n\t\f\r\b](?=[a-z]{2})")


def restore_backslashes(gold: str) -> str:
    """A gold answer with its LaTeX commands repaired: a line break before letters was a backslash."""
    return _DAMAGED.sub(lambda match: "\\" + _ESCAPED[match[0]], gold.strip())


def final_answer(summary: str) -> str | None:
    """The last \\boxed{...}, else what follows the last answer mark up to the sentence's end; else None."""
    boxed = max(summary.rfind(r"\boxed{"), summary.rfind(r"\fbox{"))
    if boxed >= 0:
        opening, depth = summary.index("{", boxed), 0
        for i in range(opening, len(summary)):
            depth += {"{": 1, "}": -1}.get(summary[i], 0)
            if depth == 0:
                if answer := clean(summary[opening + 1 : i]):
                    return answer
                break
    marks = list(_MARK.finditer(summary))
    if not marks:
        return None
    answer = _SENTENCE_END.split(summary[marks[-1].end() :].lstrip(" \t:："), maxsplit=1)[0]
    return clean(answer) or None


def clean(text: str) -> str:
    """An answer without decoration: full-width forms, bold, dollar signs around it, a full stop."""
    text = text.translate(_FULL_WIDTH).lstrip("*` \n\t").rstrip("*`。.,; \n\t")
    for opening, closing in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            text = text[len(opening) : -len(closing)].strip()
    return text.rstrip("。.,;").strip()


def _plain_text(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", clean(text))
    for latex, plain in ((r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r"\!", ""), (r"\,", " ")):
        text = text.replace(latex, plain)
    text = re.sub(r"(?:\^|(?<!\s))\s*\{?\\(?:circ|degree)\}?", "°", text)  # from where spaces begin: linear
    return _CURRENCY.sub(r"\1", text.strip()).strip("$ ")


def parse_number(text: str) -> Number | None:
    """A plain number, or None: integer, decimal, fraction, percentage; commas, currency and unit allowed."""
    text = _plain_text(text)
    match = _PLAIN.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if not match or not (match["whole"] or match["decimals"] or match["top"]):
        return None
    written = match["unit"] or ""
    if written[:1].isascii() and not match["gap"] and written and not _GLUED_UNITS.match(written):
        return None  # 2ab is algebra, 2 km and 2km are not
    words = written.lower().split()
    if words and words[0][0] in _SCALES and not words[0].isascii():
        words = [words[0][0], *filter(None, [words[0][1:]]), *words[1:]]
    scale = 1
    while words and words[0] in _SCALES:  # "million km" is 1000000 of "km"
        scale *= _SCALES[words.pop(0)]
    letter = words[0] if len(words) == 1 and len(words[0]) == 1 else ""
    is_algebra = letter.isascii() and letter and not _GLUED_UNITS.match(letter)
    below = int(match["below"] or match["bottom"] or 1)
    if is_algebra or len(words) > _MAX_UNIT_WORDS or {*words, *"".join(words)} & _NOT_UNITS or below == 0:
        return None
    unit = " ".join(words)
    above = Fraction(match["top"] or f"{(match['whole'] or '0').replace(',', '')}{match['decimals'] or ''}")
    value = (-1 if match["sign"] == "-" else 1) * above / below * scale
    percent = bool(match["percent"]) or unit in ("percent", "percentage")
    return Number(value, percent, "" if unit.startswith("percent") else unit, bool(match["decimals"]))


def same_number(gold: Number, answer: Number) -> bool:
    """Exact for integers and fractions; within 1e-6, of the larger if that is below 1, where either was
    written with decimals.

    A percent sign that only one side bears may mean either the number or its hundredth ("50%" is 50 or 0.5);
    units are compared only where both sides give one.
    """
    if gold.unit and answer.unit and gold.unit.rstrip("s.") != answer.unit.rstrip("s."):
        return False
    golds, answers = {gold.value}, {answer.value}
    if gold.percent and not answer.percent:
        golds.add(gold.value / 100)
    if answer.percent and not gold.percent:
        answers.add(answer.value / 100)
    if golds & answers:
        return True
    if not (gold.rounded or answer.rounded):
        return False
    return any(abs(g - a) * 10**6 <= min(Fraction(1), max(abs(g), abs(a))) for g in golds for a in answers)


def squeezed(text: str) -> str:
    """A text without spaces, case and \\text{}."""
    return re.sub(r"\s+", "", _plain_text(text)).lower()


def choices(text: str) -> set[str]:
    """The letters of a multiple-choice answer: "B", "(B)", "B. 12"; several where all are named: "A, C".

    Empty where it chooses none: "A or B", "I do not know", "A. Paris B. Rome".
    """
    text = _plain_text(text)
    if len(text) > _MAX_OPTION:
        return set()
    if _LETTERS.fullmatch(text):
        return set(re.findall(r"[A-J]", text))
    option = _OPTION.fullmatch(text)
    return set() if not option or _ANOTHER.search(option["words"]) else {option["letter"]}


def normalise(text: str) -> str:
    """One spelling for equal answers, for voting: numbers by value, the rest by its letters."""
    number = parse_number(text)
    if number is not None:
        return str(number.value) + ("%" if number.percent else "")
    return squeezed(text)
