"""Plain numbers as people write them, with their units: exact values as fractions.

`3`, `1,234.50`, `-3/4`, `1 1/4`, `4又1/2`, `\\frac{3}{4}`, `3.2e5`, `4.5 \\times 10^{-4}`, `0.\\overline{3}`,
`1011_2`, `25%`, `$1.5 million`, `1.2万`, `60 degrees`, `15 km/h`, `18 apples`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from r1pipe.rewards.answers.notation import REPEATING, repeating
from r1pipe.rewards.answers.numerals import in_words
from r1pipe.rewards.answers.units import CLASSIFIERS, Unit, read_unit

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_LATEX_FRACTION = r"\\frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))"
_POWER_OF_TEN = r"10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?"
_MAX_LENGTH = 120  # a number with its unit is shorter; also bounds the work on a hostile answer
_MAX_EXPONENT = 400

_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "quadrillion": 10**15, "十": 10, "百": 10**2, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7,
    "亿": 10**8,
    "万亿": 10**12,
}  # fmt: skip
_LONGEST_FIRST = "|".join(sorted(_SCALES, key=len, reverse=True))
_SCALE = re.compile(rf"\s*({_LONGEST_FIRST})(?![A-Za-z米克瓦卡焦])|(?<=\d)([kK])(?![A-Za-z])")
_PERCENT = re.compile(r"\s*(?:%|per\s?cent\b|percent(?:age)?(?: points?)?\b)")
_SIGN = re.compile(r"([+-]?)\s*(?:(?:[A-Z]{0,2}([$€£¥₹])|(USD|EUR|GBP|CNY|RMB|INR|Rs)\.?\s)\s*)?([+-]?)\s*")


def _fraction(top: str, bottom: str) -> Fraction:
    return Fraction(top.replace(",", "")) / Fraction(bottom.replace(",", ""))


def _based(digits: str, base: str) -> Fraction | None:
    if not 2 <= int(base) <= 16 or any(int(digit, 16) >= int(base) for digit in digits):
        return None
    return Fraction(int(digits, int(base)))


def _power(mantissa: str, exponent: str) -> Fraction | None:
    if abs(int(exponent)) > _MAX_EXPONENT:
        return None
    return Fraction(mantissa.replace(",", "")) * Fraction(10) ** int(exponent)


_CHINESE_QUANTITY = re.compile(
    "([零〇一二两三四五六七八九十百千万亿分之]+)([^零〇一二两三四五六七八九十百千万亿分之]+)"
)
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+|[一-鿿]{1,2})")
_COMPOUND = re.compile(rf"(?:{_PART.pattern}[\s,]*(?:and\s+)?){{2,3}}")
_INCH = {"in": "inch", "分": "分钟"}
_RATE = re.compile(r"^每(小时|分钟?|秒|天|[一-鿿])(\d.*)$")  # 每小时60千米
_BASED = re.compile(r"\(?([0-9A-F]+)\)?_\{?(\d+)\}?")

# Each way of writing a number and its value from the groups that matched; the first that fits counts.
_WAYS: list[tuple[re.Pattern[str], Callable[[list[str]], Fraction | None]]] = [
    (_BASED, lambda g: _based(*g)),
    (REPEATING, lambda g: repeating(g)),
    (re.compile(rf"({_DECIMAL})\s*(?:\\times|\\cdot|\*|[xX])\s*{_POWER_OF_TEN}"), lambda g: _power(*g)),
    (re.compile(rf"({_DECIMAL})[eE]([+-]?\d+)(?!\w)"), lambda g: _power(*g)),
    (re.compile(_POWER_OF_TEN), lambda g: _power("1", *g)),
    (
        re.compile(r"(\d+)(?:\s+and\s+|\s*又\s*|\s+)(\d+)\s*/\s*(\d+)"),
        lambda g: int(g[0]) + _fraction(*g[1:]),
    ),
    (re.compile(rf"(\d+)(?:\s*又)?\s*{_LATEX_FRACTION}"), lambda g: int(g[0]) + _fraction(*g[1:])),
    (re.compile(_LATEX_FRACTION), lambda g: _fraction(*g)),
    (re.compile(rf"({_INTEGER})\s*/\s*({_INTEGER})(?!\s*/)"), lambda g: _fraction(*g)),
    (re.compile(rf"({_DECIMAL})"), lambda g: Fraction(g[0].replace(",", ""))),
]


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    percent: bool = False
    unit: Unit | None = None
    rounded: bool = False  # written with decimals
    based: bool = False  # with its base: 1011_2

    def key(self) -> str:
        """One spelling for equal numbers, for voting."""
        if self.unit is None:
            return f"{self.value}{'%' if self.percent else ''}"
        return f"{self.value * self.unit.factor} {self.unit.name}"


@lru_cache(maxsize=4096)
def read_number(text: str) -> Number | None:
    """The number that a tidy text is, or None where it is anything else or more than that."""
    if not 0 < len(text) <= _MAX_LENGTH:
        return None
    if not any(map(str.isdigit, text)):
        return _read_words(text)
    return _read_compound(text) or _read_digits(_RATE.sub(r"\2/\1", text))


def _read_digits(text: str) -> Number | None:
    opening = _SIGN.match(text)
    assert opening is not None  # it may be empty
    matches = ((pattern.match(text, opening.end()), value_of) for pattern, value_of in _WAYS)
    match, value_of = next(((match, value_of) for match, value_of in matches if match), (None, None))
    if match is None or value_of is None:
        return None
    try:
        value = value_of([group for group in match.groups() if group is not None])
    except ZeroDivisionError:
        return None
    if value is None:
        return None
    if (opening[1] == "-") != (opening[4] == "-"):
        value = -value
    at = match.end()
    while scale := _SCALE.match(text, at):
        value, at = value * (_SCALES[scale[1]] if scale[1] else 1000), scale.end()
    percent = _PERCENT.match(text, at)
    tail = text[percent.end() if percent else at :]
    based = match.re is _BASED
    sign_of_money = opening[2] or opening[3]
    unit = read_unit(sign_of_money) if sign_of_money else None
    if tail.strip(" ."):
        before = text[len(text) - len(tail) - 1]
        behind = read_unit(tail, glued=not (tail[0].isspace() or before.isspace()))
        is_money = unit is not None and behind is not None and "^" not in behind.name  # $70,000 profit
        if behind is None or based or (unit and behind != unit and not is_money):
            return None
        unit = unit if is_money else behind if behind.name else None
    rounded = "." in match[0] and match.re is not REPEATING
    return Number(value, percent is not None, unit, rounded, based)


def _read_words(text: str) -> Number | None:
    """A number in words, with a Chinese unit behind it: forty-two, 二十四, 七个; 三角形 is none."""
    if (value := in_words(text)) is not None:
        return Number(value)
    if match := _CHINESE_QUANTITY.fullmatch(text):
        value, unit = in_words(match[1]), read_unit(match[2])
        if value is not None and unit is not None and (unit.name or CLASSIFIERS.fullmatch(match[2])):
            return Number(value, unit=unit if unit.name else None)
    return None


def _read_compound(text: str) -> Number | None:
    """`1 hour 30 minutes`, `5 ft 4 in`, 2小时30分钟: parts of one quantity, the larger first."""
    parts = _PART.findall(text) if _COMPOUND.fullmatch(text) else []
    units = [read_unit(_INCH.get(name, name)) for _, name in parts]
    if not parts or any(unit is None or "^" not in unit.name for unit in units):
        return None
    known = [unit for unit in units if unit]
    if len({unit.name for unit in known}) > 1 or known != sorted(known, key=lambda unit: -unit.factor):
        return None
    value = sum(Fraction(number) * unit.factor for (number, _), unit in zip(parts, known, strict=True))
    return Number(Fraction(value), unit=Unit(known[0].name))


def same_number(gold: Number, answer: Number) -> bool:
    """Exact for integers and fractions; within a millionth where either was written with decimals.

    The millionth is of the larger if that is below 1. A percent sign that only one side bears may mean either
    the number, if that is above 1, or its hundredth ("50%" is 50 or 0.5); units are compared only where both
    sides give one. A number with its base is only equal to another with a base.
    """
    golds, answers = {gold.value}, {answer.value}
    if (gold.unit and answer.percent) or (answer.unit and gold.percent):
        return False
    if gold.unit and answer.unit:
        if gold.unit.name != answer.unit.name:
            return False
        golds, answers = {gold.value * gold.unit.factor}, {answer.value * answer.unit.factor}
    if gold.based and not answer.based:
        return False
    if gold.percent and not answer.percent:
        golds = {gold.value / 100, *(golds if gold.value > 1 else ())}
    if answer.percent and not gold.percent:
        answers = {answer.value / 100, *(answers if answer.value > 1 else ())}
    if golds & answers:
        return True
    if not (gold.rounded or answer.rounded) or gold.value.denominator == answer.value.denominator == 1:
        return False
    return any(abs(g - a) * 10**6 <= min(Fraction(1), max(abs(g), abs(a))) for g in golds for a in answers)
