"""Reflection by what it does: a result is checked, found wrong, and changed to one that is right.

Two forms can be read off any text, in every language and notation of sums:
- a calculation that first has a wrong result and, done again, the right one: "12+7=18. Wait, 12+7=19.";
- where numbers are to make a target (Countdown), a try that is worked out and misses, then one that hits.

No word counts: "Wait, let me check: 12+7=19." does not reflect. R1's own count of words (wait, verify ...) is
`completions/reflections` of metrics.jsonl.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_NUMBER = r"\d++(?:\.\d++)?"  # without going back into it: a page of digits would take hours
_TERMS = rf"(?:\s*[-+*/×÷]\s*{_NUMBER})+\s*=\s*{_NUMBER}"
# A calculation and its result, from which further ones may go on: 12+12=24+12=36.
_CHAIN = re.compile(rf"(?<![\d.]){_NUMBER}(?:{_TERMS})+")
_STEP = re.compile(rf"([-+*/×÷=])\s*({_NUMBER})")
_LONGEST = 100_000  # characters that are read
TOLERANCE = 1e-6


class Correction(NamedTuple):
    """Where a text states a wrong result, and where it later states the right one: (start, end) of each."""

    wrong: tuple[int, int]
    right: tuple[int, int]


def corrections(text: str, checker: Mapping[str, Any] | None = None) -> list[Correction]:
    """Every result that is wrong at first and right later, in order.

    `checker`: a prompt's; where it has `numbers` and a `target`, tries count too: the first that misses, with
    the first later one that hits. A calculation that is right from the first, or never right, is none.
    """
    known = checker or {}
    given, target = sorted(known.get("numbers") or ()), known.get("target")
    wrong: dict[str, tuple[int, int]] = {}
    missed: tuple[int, int] | None = None
    found = []
    for match in _CHAIN.finditer(text[:_LONGEST]):
        read = _read(match.group())
        is_right = abs(read.stated - read.true) < TOLERANCE
        if not is_right:
            wrong.setdefault(read.calculation, match.span())
        elif read.calculation in wrong:
            found.append(Correction(wrong.pop(read.calculation), match.span()))
        if given and sorted(read.numbers) == given:
            if read.true != target:
                missed = missed or match.span()
            elif missed and is_right:
                found.append(Correction(missed, match.span()))
                given = []  # it has been found
    return found


def reflects(text: str, checker: Mapping[str, Any] | None = None) -> bool:
    return bool(corrections(text, checker))


class _Chain(NamedTuple):
    calculation: str  # numbers and operators, without results on the way
    numbers: list[float]
    stated: float  # the last result as written
    true: float


def _read(chain: str) -> _Chain:
    first = re.match(_NUMBER, chain)
    assert first is not None
    calculation, stated = first.group(), float("nan")
    numbers = [float(calculation)]
    factors = [*numbers]  # what this link adds up: products come before sums
    for operator, digits in _STEP.findall(chain, first.end()):
        number = float(digits)
        if operator == "=":
            stated, factors = number, [sum(factors)]
            continue
        calculation += operator + digits
        numbers.append(number)
        if operator in "+-":
            factors.append(number if operator == "+" else -number)
        elif operator in "*×":
            factors[-1] *= number
        else:
            factors[-1] = factors[-1] / number if number else float("nan")
    return _Chain(calculation, numbers, stated, sum(factors))
