"""What a gold answer is: its form, decided once, by which answers are found and compared."""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from r1pipe.core import python_source
from r1pipe.core.errors import DataError, nearest
from r1pipe.rewards.answers import vocabulary, words
from r1pipe.rewards.answers.notation import UNREADABLE, tidy, to_latex
from r1pipe.rewards.answers.number import Number, read_number
from r1pipe.rewards.answers.statement import boxes
from r1pipe.rewards.answers.structure import REALS, Kind, Node, formulas_of, parse

Options = tuple[tuple[str, str], ...]  # of a choice: letters and texts


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


_FORMS = {Kind.UNION: Form.INTERVAL, Kind.SEQUENCE: Form.LIST}  # of kinds that have no form by their name
_WITHOUT_STRUCTURE = (Form.CHOICE, Form.BOOLEAN, Form.DATE, Form.RATIO, Form.TEXT)
_PLACEHOLDERS = vocabulary.words("placeholders")
_NO_ANSWER = re.compile(
    r"见解析|见详解|见解答|解析见|答案见|略$|如图|暂无|不唯一|^https?://|!\[|\[image\]|\[asy\]|\bomitted\b|^see\b|#REF|"
    r"^\\square$|not available|^proven|\bqed\b|to be prove[dn]|undefined_|<img\b",
    re.IGNORECASE,
)
# JSON takes the backslash of \frac and \text for an escape, or it is lost altogether.
_ESCAPED = {"\n": "n", "\t": "t", "\f": "f", "\r": "r", "\b": "b"}
_DAMAGED = re.compile("[\n\t\f\r\b](?=[a-z]{2})")
_LOST = re.compile(r"^(?:(ext)|(rac)|(oxed)|(?:frac|dfrac|text|boxed|sqrt))(?=\{)")
_INTRODUCTION = re.compile(
    r"^(?:(?:so|thus|therefore|hence)[,\s]+)?(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|[:=])|(?:答案|答|解)\s*[是为:])\s*|"
    r"^(?:\\approx|about\b|approximately\b|约)\s*",
    re.IGNORECASE,
)
_FIRST_LETTERS = ("t", "f", "b")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_WORD = re.compile(r"(?<!\\)\b[^\W\d_]{3,}")
_FORMULA_SIGNS = re.compile(r"[\\^_=+*/<>|{}]|\d")
_MATHEMATICAL_WORDS = vocabulary.words("mathematical")
# letters that are a product rather than a word: mgh, nRT, abc
_PRODUCT = re.compile(
    r"(?![A-Z]+$)(?:[b-df-hj-np-tv-zB-DF-HJ-NP-TV-Z]{3,5}|[A-Za-z]?[a-z][A-Z][A-Za-z]{0,2}|abcd?|[A-Z]{2}[a-z])"
)
_MAX_TEXT_WORDS, _MAX_TEXT = 15, 100


@dataclass(frozen=True)
class Gold:
    """A gold answer: what was written, its form, and what is compared."""

    text: str  # tidy; of a choice its letters
    form: Form
    node: Node | None = None  # of mathematical forms
    alternatives: tuple["Gold", ...] = ()  # further answers that are right too
    options: Options = ()

    @property
    def number(self) -> Number | None:
        return self.node.number if self.node else None


@lru_cache(maxsize=8192)
def read_gold(text: str, form: str = "", options: Options = ()) -> Gold:
    """The gold answer that a text holds, read as `form` where one is named. Raises DataError, saying why."""
    if not text.strip():
        raise DataError("the gold answer is empty; fill it in or leave the row out")
    if several := _alternatives(text):
        first, *others = (read_gold(each, form, options) for each in several)
        return Gold(first.text, first.form, first.node, tuple(others), options)
    content = unwrap(restore_backslashes(text))
    if not content.isprintable():
        raise DataError(f"the gold answer {text!r} has a line break or tab in it; write one line")
    tidied = tidy(content).rstrip(" .,;")
    tidied = _INTRODUCTION.sub("", tidied) or tidied
    if not tidied or words.plain_words(tidied) in _PLACEHOLDERS or _NO_ANSWER.search(content):
        raise DataError(f"the gold answer {text!r} is no answer; fill it in or leave the row out")
    gold = _read_as(form, tidied, options) if form else _read(tidied, options)
    if gold is None:
        does_not = f"is no {form}" if form else "does not parse"
        raise DataError(f"the gold answer {text!r} {does_not}; correct it or leave the row out")
    return gold


def _alternatives(text: str) -> list[str]:
    """A list of strings that a file holds as text: '["Nelson", "Horatio Nelson"]'."""
    try:
        several = python_source.literal(text) if text.lstrip().startswith(('["', "['")) else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return several if isinstance(several, list) and all(isinstance(each, str) for each in several) else []


def restore_backslashes(gold: str) -> str:
    """A gold answer with its LaTeX commands repaired: a form feed and `rac` are \\frac."""
    gold = _DAMAGED.sub(lambda match: "\\" + _ESCAPED[match[0]], gold.strip(" ")).strip()
    if lost := _LOST.match(gold):
        letters = "".join(letter for letter, part in zip(_FIRST_LETTERS, lost.groups(), strict=True) if part)
        gold = f"\\{letters}{gold}"
    return gold


def unwrap(gold: str) -> str:
    """A gold answer without a solution around it: the last box, what follows `####`, no loose bracket."""
    if "boxed" in gold or "fbox" in gold:
        gold = next((box.text for box in reversed(boxes(gold)) if box.text), gold)
    gold = gold.rsplit("####", 1)[-1]
    while gold.count("}") > gold.count("{") and gold.rstrip("$. ").endswith("}"):  # 5}$.
        gold = gold.rstrip("$. ")[:-1]
    return gold


def _read(text: str, options: Options) -> Gold | None:
    """A tidy text in the form that it shows; None where it has none."""
    chosen = words.letters(text)
    if chosen and (len(text) > 1 or text.isupper() or options):  # e and i are numbers
        return Gold("".join(sorted(chosen)), Form.CHOICE, options=options)
    if words.truth(text) is not None and (len(text) > 1 or not text.isascii()):
        return Gold(text, Form.BOOLEAN)
    if words.date(text) is not None:
        return Gold(text, Form.DATE)
    if _RATIO.fullmatch(text):
        return Gold(text, Form.RATIO)
    if is_text(text):
        is_short = len(text) <= _MAX_TEXT and len(text.split()) <= _MAX_TEXT_WORDS
        return Gold(text, Form.TEXT) if is_short else None
    node = parse(text)
    if node is None:
        return None
    if node.number:
        return Gold(text, Form.QUANTITY if node.number.unit else Form.NUMBER, node)
    return Gold(text, _FORMS.get(node.kind) or Form(node.kind.value), node)


def _read_as(form: str, text: str, options: Options) -> Gold | None:
    """A tidy text in the form that its row names; None where it cannot be read so. Raises DataError."""
    if form not in list(Form):
        raise DataError(f"the answer's form {form} is unknown; {nearest(form, list(Form))}")
    if form == Form.TEXT:
        return Gold(text, Form.TEXT)
    if form not in _WITHOUT_STRUCTURE:
        node = parse(text)
        return Gold(text, Form(form), node) if node else None
    gold = _read(text, options)
    return gold if gold and gold.form == form else None


def is_text(text: str) -> bool:
    """Whether a tidy text is words rather than mathematics."""
    if read_number(text) or REALS.fullmatch(text) or _PRODUCT.fullmatch(text):
        return False
    if re.search("[一-鿿]", text):
        return not _FORMULA_SIGNS.search(text) or parse(text) is None or not re.search(r"[\d\\=<>]", text)
    found = [word for word in _WORD.findall(text) if word.lower() not in _MATHEMATICAL_WORDS]
    return bool(found) and (not _FORMULA_SIGNS.search(text) or len(found) >= 2)


def formulas_in(gold: Gold) -> list[str]:
    """The LaTeX that the parser must be able to read."""
    several = (gold, *gold.alternatives)
    formulas = [formula for each in several if each.node for formula in formulas_of(each.node)]
    return [to_latex(formula) for formula in formulas if not UNREADABLE.search(formula)]
