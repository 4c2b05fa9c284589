"""What a gold answer is: its form, decided once, by which answers are found and compared."""

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from r1pipe.core.errors import DataError, nearest
from r1pipe.rewards.answers import words
from r1pipe.rewards.answers.number import Number, read_number
from r1pipe.rewards.answers.notation import tidy, to_latex
from r1pipe.rewards.answers.structure import Kind, Node, formulas_of, parse


class Form(StrEnum):
    """How a gold answer is found in a text and compared."""

    NUMBER = "number"
    QUANTITY = "quantity"  # a number with its unit
    EXPRESSION = "expression"
    EQUATION = "equation"  # or inequality, where it is more than a range of one name
    LIST = "list"  # in any order
    SET = "set"
    TUPLE = "tuple"
    INTERVAL = "interval"  # or a union of them
    CHOICE = "choice"
    BOOLEAN = "boolean"
    DATE = "date"  # or time of day
    RATIO = "ratio"
    TEXT = "text"


_OF_KIND = {
    Kind.NUMBER: Form.NUMBER, Kind.FORMULA: Form.EXPRESSION, Kind.LIST: Form.LIST, Kind.TUPLE: Form.TUPLE,
    Kind.SET: Form.SET, Kind.INTERVAL: Form.INTERVAL, Kind.UNION: Form.INTERVAL, Kind.RELATION: Form.EQUATION,
    Kind.SEQUENCE: Form.LIST,
}  # fmt: skip
MATHEMATICAL = frozenset({*_OF_KIND.values(), Form.QUANTITY})
_PLACEHOLDERS = set("""
    proof proved seesolution seesolutions seeabove seebelow solution notfound nan none null undefined inf infinity
    unknown noanswer answer tbd todo omitted error missing empty various answersvary answermayvary 略 见解析 无答案 证明略
    证明 见答案 略 答案略 见详解
""".split())  # fmt: skip
_ESCAPED = {"\n": "n", "\t": "t", "\f": "f", "\r": "r", "\b": "b"}
_DAMAGED = re.compile("[\n\t\f\r\b](?=[a-z]{2})")
_LOST_BACKSLASH = re.compile(r"^(?:ext|rac|imes|sqrt|frac|dfrac|text|oxed|egin|eta|heta|au|ho|ight)(?=\{)|(?<![a-zA-Z\\])(?:ext|rac)(?=\{)")
_WHOLE_NAMES = {"ext": "text", "rac": "frac", "imes": "times", "oxed": "boxed", "egin": "begin", "eta": "beta"}
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_WORD = re.compile(r"(?<!\\)\b[^\W\d_]{3,}")
_FORMULA_SIGNS = re.compile(r"[\\^_=+*/<>|{}]|\d")
_MAX_TEXT_WORDS, _MAX_TEXT = 15, 100


@dataclass(frozen=True)
class Gold:
    """A gold answer: what was written, its form, and what is compared."""

    text: str  # tidy
    form: Form
    node: Node | None = None  # of mathematical forms
    alternatives: tuple["Gold", ...] = ()  # further answers that are right too
    options: tuple[tuple[str, str], ...] = ()  # of a choice: letter and text, where they are known

    @property
    def number(self) -> Number | None:
        return self.node.number if self.node else None


@lru_cache(maxsize=8192)
def read_gold(text: str, form: str = "", options: tuple[tuple[str, str], ...] = ()) -> Gold:
    """The gold answer that a text holds, read as `form` where one is named. Raises DataError, saying why."""
    if not text.strip():
        raise DataError("the gold answer is empty; fill it in or leave the row out")
    if text.lstrip().startswith("[\"") or text.lstrip().startswith("['"):
        if several := _alternatives(text):
            first, *others = (read_gold(each, form, options) for each in several)
            return Gold(first.text, first.form, first.node, tuple(others), options)
    content = unwrap(restore_backslashes(text))
    if not content.isprintable():
        raise DataError(f"the gold answer {text!r} has a line break or tab in it; write one line")
    tidied = tidy(content).rstrip(" .。,;")
    if words.plain_words(tidied) in _PLACEHOLDERS or not tidied:
        raise DataError(f"the gold answer {text!r} is no answer; fill it in or leave the row out")
    if form:
        return _read_as(form, tidied, text, options)
    gold = _read(tidied, options)
    if gold is None:
        raise DataError(f"the gold answer {text!r} does not parse; correct it or leave the row out")
    return gold


def _alternatives(text: str) -> list[str]:
    """A list of strings that was stored as text."""
    try:
        several = json.loads(text)
    except ValueError:
        return []
    return several if isinstance(several, list) and all(isinstance(each, str) for each in several) else []


def restore_backslashes(gold: str) -> str:
    """A gold answer with its LaTeX commands repaired: JSON takes \\f and \\t for a form feed and a tab."""
    gold = _DAMAGED.sub(lambda match: "\\" + _ESCAPED[match[0]], gold.strip("  "))
    return _LOST_BACKSLASH.sub(lambda match: "\\" + _WHOLE_NAMES.get(match[0], match[0]), gold.strip())


def unwrap(gold: str) -> str:
    """A gold answer without a solution around it: the last box, what follows `####`, no loose bracket."""
    if "boxed" in gold or "fbox" in gold:
        from r1pipe.rewards.answers.statement import boxes

        if found := boxes(gold):
            return found[-1].text
    if "####" in gold:
        gold = gold.rsplit("####", 1)[1]
    while gold.count("}") > gold.count("{") and gold.rstrip("$. ").endswith("}"):  # 5}$.
        gold = gold.rstrip("$. ")[:-1]
    return gold


def _read(text: str, options: tuple[tuple[str, str], ...]) -> Gold | None:
    if chosen := words.letters(text):
        if len(text) > 1 or text.isupper() or options:  # e and i are numbers
            return Gold("".join(sorted(chosen)), Form.CHOICE, options=options)
    if words.truth(text) is not None and len(text) > 1:
        return Gold(text, Form.BOOLEAN)
    if words.date(text) is not None:
        return Gold(text, Form.DATE)
    if _RATIO.fullmatch(text):
        return Gold(text, Form.RATIO)
    if is_text(text):
        return Gold(text, Form.TEXT) if len(text) <= _MAX_TEXT and len(text.split()) <= _MAX_TEXT_WORDS else None
    node = parse(text)
    if node is None:
        return None
    if node.number:
        return Gold(text, Form.QUANTITY if node.number.unit else Form.NUMBER, node)
    return Gold(text, _OF_KIND[node.kind], node)


def is_text(text: str) -> bool:
    """Whether a tidy text is words rather than mathematics."""
    if read_number(text):
        return False
    if re.search(r"[一-鿿]", text):
        return not (_FORMULA_SIGNS.search(text) and parse(text)) or not re.search(r"[\d\\=<>]", text)
    found = [word for word in _WORD.findall(text) if word.lower() not in _MATHEMATICAL_WORDS]
    if not found:
        return False
    return not _FORMULA_SIGNS.search(text) or len(found) >= 2


_MATHEMATICAL_WORDS = set("sin cos tan cot sec csc log exp sqrt arcsin arccos arctan sinh cosh tanh max min gcd lcm and "
                          "mod pmod bmod circ frac begin end pmatrix bmatrix matrix vmatrix array det infinity inf "
                          "infty for all".split())  # fmt: skip


def _read_as(form: str, text: str, written: str, options: tuple[tuple[str, str], ...]) -> Gold:
    """A gold answer whose form its row names. Raises DataError."""
    if form not in list(Form):
        raise DataError(f"the answer's form {form} is unknown; {nearest(form, list(Form))}")
    if form == Form.TEXT:
        return Gold(text, Form.TEXT)
    gold = _read(text, options)
    node = parse(text)
    if form in MATHEMATICAL and node is not None:
        return Gold(text, Form(form), node)
    if gold is None or gold.form != form:
        raise DataError(f"the gold answer {written!r} is no {form}; correct it, or name another form")
    return gold


def formulas_in(gold: Gold) -> list[str]:
    """The LaTeX that the parser must be able to read."""
    several = (gold, *gold.alternatives)
    return [to_latex(formula) for each in several if each.node for formula in formulas_of(each.node)]
