"""Numbers in words: "forty-two", "one half", 二十四, 百分之八十, 三分之二."""

import re
from fractions import Fraction

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: number for number, word in enumerate(_ONES)}
_VALUES |= {word: 10 * number for number, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7,
    "eighth": 8, "ninth": 9, "tenth": 10, "hundredth": 100,
}  # fmt: skip
_CHINESE = {sign: number for number, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_CHINESE_NUMBER = re.compile(r"[零〇一二两三四五六七八九十百千万亿]{1,12}")
_TWO_DIGITS = re.compile("[一二两三四五六七八九]{2}")
_CHINESE_FRACTION = re.compile(r"([^分之]{1,12})分之([^分之]{1,12})")


def in_words(text: str) -> Fraction | None:
    """The number that words name, or None."""
    if not 2 <= len(text) <= 80:
        return _chinese(text)
    words = re.split(r"[\s-]+", text.lower().replace(" and ", " ").strip())
    if words[0] in ("minus", "negative"):
        positive = in_words(" ".join(words[1:]))
        return None if positive is None else -positive
    if len(words) > 1 and (part := _PARTS.get(words[-1].removesuffix("s"), _PARTS.get(words[-1]))):
        top = Fraction(1) if words[:-1] in (["a"], ["an"]) else _english(words[:-1])
        return None if top is None else top / part
    return _english(words) if words[0] in _VALUES else _chinese(text)


def _english(words: list[str]) -> Fraction | None:
    total = group = 0
    previous = ""
    for word in words:
        if word in _VALUES:
            may_follow = not previous or previous in _SCALES or (previous in _TENS and 0 < _VALUES[word] < 10)
            if not may_follow:
                return None
            group += _VALUES[word]
        elif word == "hundred" and 0 < group < 100:
            group *= 100
        elif word in _SCALES and word != "hundred" and group:
            total, group = total + group * _SCALES[word], 0
        else:
            return None
        previous = word
    return Fraction(total + group)


def _chinese(text: str) -> Fraction | None:
    if fraction := _CHINESE_FRACTION.fullmatch(text):
        bottom, top = (_chinese_integer(part) for part in fraction.groups())
        return Fraction(top, bottom) if top is not None and bottom else None
    number = _chinese_integer(text)
    return None if number is None else Fraction(number)


def _chinese_integer(text: str) -> int | None:
    """二十四; digit by digit, 二〇二四; 三万五 is 35,000. None for 三四, which is three or four."""
    if not _CHINESE_NUMBER.fullmatch(text):
        return None
    if all(sign in _CHINESE for sign in text) and (len(text) != 2 or text[0] in "零〇" or text[1] in "零〇"):
        return int("".join(str(_CHINESE[sign]) for sign in text))
    if _TWO_DIGITS.search(text):
        return None
    total = section = digit = 0
    for sign in text:
        if sign in _CHINESE:
            digit = _CHINESE[sign]
        elif sign in "十百千":
            section += (digit or 1) * _CHINESE_SCALES[sign]
            digit = 0
        elif sign == "万" and total:  # 一亿二千万
            total, section, digit = total + (section + digit) * 10**4, 0, 0
        else:
            total, section, digit = (total + section + digit or 1) * _CHINESE_SCALES[sign], 0, 0
    if digit and text[-2] in "百千万亿":
        digit = digit * _CHINESE_SCALES[text[-2]] // 10
    return total + section + digit
