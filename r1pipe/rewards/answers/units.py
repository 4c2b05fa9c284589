"""Units behind a number: which quantity they measure and by what factor (pint), or what is counted.

`5 m`, `km/h`, `m/s^2`, `square centimeters`, `平方厘米`, `60 degrees`, `5 USD` are quantities; `18 apples` counts
apples. Words that change the number (`5 squared`, `5 or 6`) are no unit.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Unit:
    """What is measured or counted, and the factor to its base unit. An empty name says nothing: `10 units`."""

    name: str
    factor: Fraction = Fraction(1)


NOTHING = Unit("")

# pint's name -> what people write; all but signs with a capital are read whatever their case
_SPELLINGS = {
    "meter": "m meter meters metre metres 米", "kilometer": "km kilometer kilometers kilometre kilometres kms 千米 公里",
    "centimeter": "cm centimeter centimeters centimetre centimetres 厘米", "decimeter": "dm decimeter decimeters 分米",
    "millimeter": "mm millimeter millimeters millimetre millimetres 毫米", "micrometer": "micrometer micrometers 微米",
    "nanometer": "nm nanometer nanometers 纳米", "inch": "inch inches", "foot": "ft foot feet",
    "yard": "yd yard yards", "mile": "mi mile miles 英里", "hectare": "ha hectare hectares 公顷", "acre": "acre acres 英亩",
    "liter": "l L liter liters litre litres 升", "milliliter": "ml mL milliliter milliliters millilitre millilitres 毫升",
    "gallon": "gal gallon gallons", "gram": "g gram grams 克", "kilogram": "kg kgs kilogram kilograms kilo kilos 千克 公斤",
    "milligram": "mg milligram milligrams 毫克", "metric_ton": "t tonne tonnes 吨", "pound": "lb lbs pound pounds 磅",
    "ounce": "oz ounce ounces", "second": "s sec secs second seconds 秒 秒钟", "minute": "min mins minute minutes 分钟",
    "hour": "h hr hrs hour hours 小时 时", "day": "day days 天 日", "week": "week weeks 周 星期", "month": "month months 个月 月",
    "year": "year years yr yrs 年", "millisecond": "ms millisecond milliseconds 毫秒", "newton": "newton newtons 牛顿 牛",
    "joule": "joule joules 焦耳 焦", "watt": "watt watts 瓦 瓦特", "kilowatt": "kW kilowatt kilowatts 千瓦", "volt": "volt volts 伏 伏特",
    "ampere": "ampere amperes amp amps 安 安培", "ohm": "ohm ohms \\Omega 欧 欧姆", "hertz": "Hz hertz 赫兹", "pascal": "Pa pascal pascals 帕",
    "mole": "mol mole moles 摩尔", "kelvin": "K kelvin 开", "kilojoule": "kJ kilojoule kilojoules 千焦", "electron_volt": "eV",
    "kilowatt_hour": "kWh 千瓦时", "kilometer/hour": "kph kmh", "mile/hour": "mph", "byte": "byte bytes 字节",
    "arcdeg": "^{\\circ} degree degrees deg 度", "celsius": "^{\\circ}C celsius 摄氏度", "fahrenheit": "^{\\circ}F fahrenheit 华氏度",
    "radian": "rad radian radians 弧度", "usd": "$ USD usd dollar dollars US$ 美元", "usd/100": "cent cents ¢ 美分", "eur": "€ EUR euro euros 欧元",
    "gbp": "£ GBP 英镑", "jpy": "JPY yen 日元", "cny": "¥ CNY RMB rmb yuan 元 块 块钱 人民币 元钱", "cny/10": "角 毛", "inr": "₹ rupee rupees Rs INR",
    "newton*meter": "Nm",
}  # fmt: skip
# Signs that are also names of variables; they are units only where a blank or \text{} sets them apart.
_SYMBOLS = {"N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere", "F": "farad", "C": "coulomb"}
_OF_SPELLING = {word: name for name, words in _SPELLINGS.items() for word in words.split()}
_OWN = ("arcdeg", "celsius", "fahrenheit", "usd", "eur", "gbp", "jpy", "cny", "inr")

# Words that make another number of it, or none.
_CHANGES = re.compile(
    r"""\d|[=<>+*(){}\[\]|?]|\\(?!cdot|Omega|circ)|(?<![a-z])(?:
    squared|cubed|factorial|plus|minus|divided|multiplied|over|point|half|halves|quarters?|root|sqrt|power|
    more|less|fewer|greater|smaller|larger|than|short|and|or|nor|to|through|between|but|not|no|never|any|other|
    maybe|perhaps|possibly|probably|might|could|unknown|either|neither|above|below|times\s+\w+|mod|modulo|base|
    pi|e|i|x|y|z|n|hundred|thousand|million|billion|trillion|k|dozen|ago|o'clock|
    zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|sixty|
    seventy|eighty|ninety|\w+illion|\w+illionths?|thirds?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|
    tenths?|elevenths?|twelfths?|\w+teenths?|\w+tieths?|\w+tieth|hundredths?|thousandths?|a)(?![a-z])
    |[加减乘除的平立次又半或至到非不左右余多少阶分]""",
    re.IGNORECASE | re.VERBOSE,
)
_MAX_WORDS = 4
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
_CLASSIFIERS = re.compile("[个只名位件本张支辆条块根头次枚棵株朵套种组对双杯盒袋箱瓶题道页行列层间家所座台匹岁倍人份颗粒片艘架盏把回场项]+")
_FILLERS = {"the", "of", "in", "total", "altogether", "each", "left", "them", "these", "those", "there", "all", "still",
            "remaining", "now", "per", "every", "unit", "units", "square", "cubic", "exactly", "respectively"}  # fmt: skip
_FACTOR = re.compile(r"(?P<word>\^\{\\circ\}\s?[CF]?|[^\W\d_]+|[$€£¥₹¢])\s*(?:\^?\{?(?P<power>-?\d)\}?)?")


def read_unit(text: str, glued: bool = False) -> Unit | None:
    """The unit that a tidy text names; None where it is no unit, but algebra or words that say more.

    `glued`: no blank stands before it: 2km is a length, 2ab is algebra.
    """
    text = text.strip(" .")
    if unit := _quantity(text, glued):
        return unit
    if re.search("[\u4e00-\u9fff]", text):
        rest = _CLASSIFIERS.sub("", text, count=1)
        if _CHANGES.search(rest) or len(rest) > 6 or not re.fullmatch("[\u4e00-\u9fff]*", rest):
            return None
        return _quantity(rest, glued=False) or NOTHING if rest else NOTHING
    words = text.lower().replace(",", " ").split()
    if glued or not 0 < len(words) <= _MAX_WORDS or _CHANGES.search(text.lower()):
        return None
    if not all(re.fullmatch(r"[a-z][a-z'.-]+", word) for word in words):
        return None
    counted = [_stem(word) for word in words if word not in _FILLERS]
    return Unit(" ".join(counted)) if counted else NOTHING


def _stem(word: str) -> str:
    return word.rstrip(".").removesuffix("s")


def _quantity(text: str, glued: bool) -> Unit | None:
    """A product of powers of known units."""
    for word, per in ((" per ", "/"), ("每", "/"), (r"\cdot", "*"), (" times ", "*")):
        text = text.replace(word, per)
    text = re.sub(r"\bdegrees?\s+(?=celsius|fahrenheit)", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(square|sq\.?|cubic|cu)\s+(?=[A-Za-z])|(平方|立方)(?=\w)", r"\1\2 ", text)
    factors: list[str] = []
    divided, power = False, 1
    at = 0
    while at < len(text):
        if text[at] in " */":
            divided = divided or text[at] == "/"
            at += 1
            continue
        word = re.match(r"square|sq\.?|cubic|cu\b|平方|立方", text[at:])
        if word and text[at + word.end() :].strip():
            power, at = _POWERS[word[0]], at + word.end()
            continue
        match = _FACTOR.match(text, at)
        if match is None:
            return None
        name = _name_of(match["word"].replace(" ", ""), glued and not factors)
        if name is None:
            return None
        at = match.end()
        if after := re.match(r"\s*(squared|cubed)\b", text[at:]):
            power, at = 2 if after[1] == "squared" else 3, at + after.end()
        exponent = int(match["power"] or 1) * power * (-1 if divided else 1)
        factors.append(f"({name})**{exponent}")
        power = 1
    return _measured("*".join(factors)) if factors else None


def _name_of(word: str, glued: bool) -> str | None:
    if word in _OF_SPELLING:
        return _OF_SPELLING[word]
    if word in _SYMBOLS:
        return None if glued else _SYMBOLS[word]
    lower = word.lower()
    return _OF_SPELLING.get(lower) if len(lower) > 1 else None


@cache
def _measured(expression: str) -> Unit:
    """A unit in pint's words as dimensions and a factor."""
    registry = _registry()
    base = registry.parse_expression(expression).to_base_units()
    return Unit("*".join(sorted(f"{name}^{power}" for name, power in base.units._units.items())) or "ratio", base.magnitude)


@cache
def _registry() -> Any:
    from pint import UnitRegistry  # half a second, and most answers have no unit

    registry = UnitRegistry(non_int_type=Fraction)
    for name in _OWN:  # money, and angles and temperatures, which are compared in their own unit
        registry.define(f"{name} = [{name}]")
    return registry
