"""Units behind a number: which quantity they measure and by what factor (pint), or what is counted.

`5 m`, `km/h`, `m/s^2`, `square centimeters`, `平方厘米`, `60 degrees`, `5 USD` are quantities; `18 apples`
counts apples. Words that change the number (`5 squared`, `5 or 6`) are no unit.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from r1pipe.rewards.answers import vocabulary


@dataclass(frozen=True)
class Unit:
    """What is measured or counted, and the factor to its base unit; without a name it says nothing."""

    name: str
    factor: Fraction = Fraction(1)


NOTHING = Unit("")
_OWN_DIMENSIONS = ("arcdeg", "celsius", "fahrenheit", "usd", "eur", "gbp", "jpy", "cny", "inr", "unit_length")
# Signs that are also names of variables: units only where a blank sets them apart.
_SYMBOLS = {
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "A": "ampere",
    "F": "farad",
    "C": "coulomb",
}

_MAKES_ANOTHER_NUMBER = re.compile(
    rf"\d|[=<>+*(){{}}\[\]|?]|\\(?!cdot|Omega|circ)|(?<![a-z]){vocabulary.any_of('other_numbers')}(?![a-z])|"
    "[加减乘除的平立次又半或至到非不余多少阶分成上下内]",
    re.IGNORECASE,
)
CLASSIFIERS = re.compile(  # Chinese measure words, which do not say what is counted
    "[个只名位件本张支辆条块根头次枚棵株朵套种组对双杯盒袋箱瓶题道页行列层间家所座台匹岁倍人份颗粒片艘架盏把回场项]+"
)
_FILLERS = vocabulary.words("fillers")
_NAMES = vocabulary.names_of_units()
_MAX_WORDS = 4
_MAX_CHARACTERS = 6  # of a Chinese noun
# Signs whose case says what they are: MeV, mW, MHz; pint reads them.
_SI = re.compile(
    r"(?:[YZEPTGMkhdcmunpf]|µ|μ)(?:m|g|s|A|K|mol|Hz|N|Pa|J|W|V|C|F|eV|L|l|T|H|Wb|Bq|Gy|Sv|cal|Wh|bar|B|ohm)"
)
_POWERS = {
    "square": 2,
    "sq": 2,
    "sq.": 2,
    "cubic": 3,
    "cu": 3,
    "平方": 2,
    "立方": 3,
    "squared": 2,
    "cubed": 3,
}
_BEFORE_A_UNIT = re.compile(r"(?:square|sq\.?|cubic|cu)\s+|平方|立方")
_FACTOR = re.compile(
    r"(?P<word>\^\{\\circ\}\s?[CF]?|\\Omega|[^\W\d_]+|[$€£¥₹¢])\s*"
    r"(?:\^?\{?(?P<power>-?\d)\}?|(?P<words>squared|cubed)\b)?"
)


def read_unit(text: str, glued: bool = False) -> Unit | None:
    """The unit that a tidy text names; None where it is no unit, but algebra or words that say more.

    `glued`: no blank stands before it: 2km is a length, 2ab is algebra.
    """
    text = text.strip(" .")
    if unit := _read_quantity(text, glued):
        return unit
    if re.search("[一-鿿]", text):
        noun = CLASSIFIERS.sub("", text, count=1)
        is_noun = len(noun) <= _MAX_CHARACTERS and re.fullmatch("[一-鿿]*", noun)
        if not is_noun or _MAKES_ANOTHER_NUMBER.search(noun):
            return None
        return _read_quantity(noun, glued=False) or NOTHING
    words = text.lower().replace(",", " ").split()
    if glued or not 0 < len(words) <= _MAX_WORDS or _MAKES_ANOTHER_NUMBER.search(text):
        return None
    if not all(re.fullmatch(r"[a-z][a-z'.-]+", word) for word in words):
        return None
    counted = [word.rstrip(".").removesuffix("s") for word in words if word not in _FILLERS]
    return Unit(" ".join(counted)) if counted else NOTHING


def _read_quantity(text: str, glued: bool) -> Unit | None:
    """A product of powers of known units."""
    for word, sign in ((" per ", "/"), ("每", "/"), (r"\cdot", "*"), (" times ", "*")):
        text = text.replace(word, sign)
    text = re.sub(r"\\mu\s*(?=[A-Za-z])", "u", text)
    text = re.sub(r"([kM])\s*\\Omega", r"\1ohm", text)
    text = re.sub(r"\\frac\s*\{([^{}]+)\}\s*\{([^{}]+(?:\^\{?\d\}?)?)\}", r"\1/\2", text)
    text = re.sub(r"\bdegrees?\s+(?=celsius|fahrenheit)", "", text, flags=re.IGNORECASE)
    factors: list[str] = []
    at, divided, power = 0, False, 1
    while at < len(text):
        if text[at] in " */":
            divided = divided or text[at] == "/"
            at += 1
        elif before := _BEFORE_A_UNIT.match(text, at):
            power, at = _POWERS[before[0].strip()], before.end()
        else:
            match = _FACTOR.match(text, at)
            name = _name_of(match["word"].replace(" ", ""), glued and not factors) if match else None
            if match is None or name is None:
                return None
            exponent = int(match["power"] or _POWERS.get(match["words"], 1)) * power
            if name == "unit_length" and exponent == 1:  # 5 units of anything
                return None
            factors.append(f"({name})**{-exponent if divided else exponent}")
            at, power = match.end(), 1
    return _measure("*".join(factors)) if factors else None


def _name_of(word: str, glued: bool) -> str | None:
    """pint's name of a unit as it is written."""
    if word not in _NAMES and _SI.fullmatch(word):
        return word.replace("µ", "u").replace("μ", "u")
    if word in _SYMBOLS:
        return None if glued else _SYMBOLS[word]
    return _NAMES.get(word) or (_NAMES.get(word.lower()) if len(word) > 1 else None)


@cache
def _measure(expression: str) -> Unit:
    """A unit in pint's words by its dimensions and factor."""
    base = _registry().parse_expression(expression).to_base_units()
    dimensions = sorted(f"{name}^{power}" for name, power in base.unit_items())
    return Unit("*".join(dimensions) or "ratio", Fraction(base.magnitude))


@cache
def _registry() -> Any:
    from pint import UnitRegistry  # half a second, and most answers have no unit

    registry: Any = UnitRegistry(non_int_type=Fraction)
    for name in _OWN_DIMENSIONS:
        registry.define(f"{name} = [{name}]")
    return registry
