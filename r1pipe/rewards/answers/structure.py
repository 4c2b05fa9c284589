"""The structure of a mathematical answer: lists, tuples, sets, intervals, unions and relations of formulas.

It is read from a tidy text without a formula parser; `comparison.py` compares two.
"""

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache

from r1pipe.rewards.answers.number import Number, read_number

MAX_ITEMS, MAX_DEPTH = 60, 30  # bound the work on a hostile answer
_OPENING, _CLOSING = "([{", ")]}"
# a comma within 1,234 is none
_LIST_SEPARATOR = re.compile(
    r"(?:;|(?<!\d),|,(?!\d{3}(?!\d)))\s*(?:(?:and|or)\b|[和或])?|\s+(?:and|or)\s+|\s*[和或与]\s*"
)
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv)(?![A-Za-z])|<=|>=|!=|==|[=<>]")
_MEANS = {"<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "=", r"\approx": "="}
_FLIPPED = {">": "<", r"\ge": r"\le"}
NAME = re.compile(
    r"(?:\\angle\s*)?(?:\\?[A-Za-z]+|[一-鿿]+)'?(?:_\{?\w+\}?)?(?:\^\{-1\})?"
    r"(?:\s*\(\s*-?\w+(?:\s*,\s*-?\w+)*\s*\))?|"
    r"\\frac\s*\{\s*d\s*[A-Za-z]?\s*\}\s*\{\s*d\s*[A-Za-z]\s*\}"
)
REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|(?:all )?real numbers|(?:全体|一切|任意)实数")
_TWO_NUMBERS = re.compile(r"(?<![_^\d])(?<!\\frac )\d+\s+\d")
_FRENCH = re.compile(r"[\[\](]([^\[\]()]+,[^\[\]()]+)[\[\])]")  # [0, 1[
_AND, _OR = re.compile(r"\band\b|[和与]"), re.compile(r"\bor\b|或")
_LABEL = re.compile(r"(?:^|(?<=[\s,;]))\(?([a-e]|[1-5])\)\s*[:.]?\s*(?=\S)")
_BUILDER = re.compile(r"([A-Za-z])\s*[|:]\s*(\1\s*(?:[<>]|\\(?:ge|le|ne)(?![A-Za-z])).+)")
_REMAINDER = re.compile(r"(\d+)\s*(?:remainder|余|\bR\b|\\ldots\s*\\ldots|\.{6})\s*(\d+)")
_ABSOLUTE = re.compile(r"\|([A-Za-z])\|")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")


class Kind(StrEnum):
    NUMBER = "number"
    FORMULA = "expression"
    LIST = "list"  # in any order
    TUPLE = "tuple"
    SET = "set"
    INTERVAL = "interval"
    UNION = "union"
    RELATION = "equation"  # or inequality
    SEQUENCE = "sequence"  # 1, 2, \ldots, n


@dataclass(frozen=True)
class Node:
    """One level of an answer; `text` is what was written, `mark` the brackets or the relation."""

    kind: Kind
    text: str
    items: tuple["Node", ...] = ()
    mark: str = ""
    name: str = field(default="", compare=False)  # of an interval that a relation gives: x of x > 3
    number: Number | None = field(default=None, compare=False)


@lru_cache(maxsize=4096)
def parse(text: str) -> Node | None:
    """The structure of a tidy text; None where brackets do not match or something is missing."""
    text = text.strip().rstrip(".;,").strip()
    if not text:
        return None
    if number := read_number(text):
        return Node(Kind.NUMBER, text, number=number)
    if french := _FRENCH.fullmatch(text):
        text = f"{'(' if text[0] == ']' else text[0]}{french[1]}{')' if text[-1] == '[' else text[-1]}"
    if not _is_balanced(text) or _TWO_NUMBERS.search(text) or re.search(r"\d\s*'", text):
        return None
    if builder := _BUILDER.fullmatch(text):  # x | x > 1, of which tidying has taken the braces
        return parse(builder[2])
    if REALS.fullmatch(text):
        return parse(r"(-\infty, \infty)")
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Node(Kind.SET, text)
    if r"\ldots" in text or "..." in text:
        return Node(Kind.SEQUENCE, re.sub(r"\s+", "", text.replace("...", r"\ldots")))
    return _collection(text) or _formula(text)


def _collection(text: str) -> Node | None:
    """A union, list, relation, tuple, set or interval; None where it is none, or something is missing."""
    remainder = _REMAINDER.fullmatch(text)
    if entries := [*remainder.groups()] if remainder else _labelled(text) or _vector(text):
        return _of_items(Kind.TUPLE, text, entries, "()")
    if r"\cup" in text and len(parts := _split(text, _CUP)) > 1:
        union = _of_items(Kind.UNION, text, parts)
        if union and all(item.kind is Kind.SET for item in union.items):
            items = tuple(each for item in union.items for each in item.items)
            return replace(union, kind=Kind.SET, items=items)
        return union
    parts = _split(text, _LIST_SEPARATOR)
    if len(parts) > 1:
        return _list(text, parts)
    return _relation(text) or _bracketed(text)


def _formula(text: str) -> Node | None:
    if len(_split(text, _LIST_SEPARATOR)) > 1 or (r"\cup" in text and len(_split(text, _CUP)) > 1):
        return None  # a list with an item that cannot be read
    if _PLUS_MINUS.search(text):
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-").removeprefix("+")
        return _of_items(Kind.LIST, text, [upper, text.replace(r"\pm", "-").replace(r"\mp", "+")])
    return Node(Kind.FORMULA, re.sub(r"\s*(?:\b(?:radians?|rad)|弧度)$", "", text) or text)


def _vector(text: str) -> list[str]:
    """The entries of a matrix of one row or column."""
    matrix = _MATRIX.fullmatch(text)
    rows = [row.strip() for row in matrix[2].split(r"\\") if row.strip()] if matrix else []
    cells = [cell.strip() for row in rows for cell in row.split("&")]
    return cells if 1 < len(cells) == max(len(rows), rows[0].count("&") + 1) else []


def _labelled(text: str) -> list[str]:
    """The parts of `(a) 3 (b) 5`, in the order of the labels; empty where there are none."""
    labels = [*_LABEL.finditer(text)]
    names = "".join(label[1] for label in labels)
    if len(labels) < 2 or labels[0].start() or not ("abcde".startswith(names) or "12345".startswith(names)):
        return []
    ends = [*(label.start() for label in labels[1:]), len(text)]
    return [text[label.end() : end].strip(" ,;") for label, end in zip(labels, ends, strict=True)]


def _is_balanced(text: str) -> bool:
    """Whether every bracket has its partner; half-open intervals may close with the other kind.

    False where they are nested too deeply.
    """
    stack: list[str] = []
    for character in re.sub(r"\\[{}]", lambda m: {r"\{": "(", r"\}": ")"}[m[0]], text):
        if character in _OPENING:
            stack.append(character)
            if len(stack) > MAX_DEPTH:
                return False
        elif character in _CLOSING and (not stack or (stack.pop() == "{") != (character == "}")):
            return False
    return not stack


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text between separators that are in no bracket and no \\begin...\\end."""
    parts, depth, at, began = [], 0, 0, 0
    while at < len(text):
        if text.startswith(r"\begin", at):
            depth += 1
        elif text.startswith(r"\end", at):
            depth -= 1
        elif text[at] in _OPENING:
            depth += 1
        elif text[at] in _CLOSING:
            depth -= 1
        elif depth == 0 and (match := separator.match(text, at)) and match.end() > at:
            parts.append(text[began:at].strip())
            at = began = match.end()
            continue
        at += 1
    return [*parts, text[began:].strip()]


def _of_items(kind: Kind, text: str, parts: list[str], mark: str = "") -> Node | None:
    items = [parse(part) for part in parts]
    if len(items) > MAX_ITEMS:
        return None
    if any(item is None for item in items):
        return None
    complete: list[Node] = []
    for item in items:
        flat = item is not None and kind in (Kind.LIST, Kind.SET) and item.kind is Kind.LIST  # {0, \pm 1}
        complete += (item.items if flat else (item,)) if item else ()
    return Node(kind, text, tuple(complete), mark)


def _list(text: str, parts: list[str]) -> Node | None:
    """`2, 3`, `x = 2 or x = 3`, and `m = 3, 4, 5`, where the name belongs to all.

    The mark says what joins them: "and", "or" or nothing. Two ranges of one name that hold together are one.
    """
    first = _split(parts[0], _RELATION)
    others_have_none = not any(_RELATION.search(part) for part in parts[1:])
    if len(first) == 2 and NAME.fullmatch(first[0]) and "=" in parts[0] and others_have_none:
        parts = [first[1], *parts[1:]]
    node = _of_items(Kind.LIST, text, parts, "and" if _AND.search(text) else "or" if _OR.search(text) else "")
    return _intersection(node) if node and node.mark != "or" else node


def _intersection(node: Node) -> Node:
    """`x > 1 and x < 4` as the interval that it is; `x < 0, x > 1` stays as it is."""
    ranges = [item for item in node.items if item.kind is Kind.INTERVAL and item.name]
    if len(ranges) != 2 or len(node.items) != 2 or ranges[0].name != ranges[1].name:
        return node
    low, high = sorted(ranges, key=lambda item: item.items[0].text == r"-\infty")
    ends = low.items[0].number, high.items[1].number
    if high.items[0].text != r"-\infty" or low.items[1].text != r"\infty" or not (ends[0] and ends[1]):
        return node
    if ends[0].value >= ends[1].value:
        return node
    brackets = low.mark[0] + high.mark[-1]
    return Node(Kind.INTERVAL, node.text, (low.items[0], high.items[1]), brackets, low.name)


def _relation(text: str) -> Node | None:
    sides = _split(text, _RELATION)
    if len(sides) < 2 or not all(sides):
        return None
    marks = [_MEANS.get(mark, mark) for mark in _marks(text, sides)]
    if marks == [r"\in"]:
        return parse(sides[1])
    if set(marks) <= {">", r"\ge"}:
        sides, marks = sides[::-1], [_FLIPPED[mark] for mark in reversed(marks)]
    if set(marks) <= {"<", r"\le"} and (ends := _range(sides, [mark == r"\le" for mark in marks])):
        low, high, brackets, name = ends
        interval = _of_items(Kind.INTERVAL, text, [low, high], brackets)
        return replace(interval, name=name) if interval else None
    if marks == ["="] and (equations := _of_names(sides)):  # (x, y) = (1, 2)
        return _of_items(Kind.LIST, text, equations)
    if len(sides) == 2 or set(marks) == {"="}:  # 2 + 3 = 4 + 1 = 5 too
        return _of_items(Kind.RELATION, text, sides, marks[0])
    return None


def _of_names(sides: list[str]) -> list[str]:
    """The equations of a tuple of names and one of values."""
    tuples = [_split(side[1:-1], re.compile(",")) for side in sides if side[0] == "(" and side[-1] == ")"]
    if len(tuples) != 2 or not 1 < len(tuples[0]) == len(tuples[1]):
        return []
    if not all(re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?", name) for name in tuples[0]):
        return []
    return [f"{name} = {value}" for name, value in zip(*tuples, strict=True)]


def _range(sides: list[str], closed: list[bool]) -> tuple[str, str, str, str] | None:
    """`a < x <= b`, `x < b` and `a < x` as ends, brackets and name; None where no name is bounded."""
    is_name = [NAME.fullmatch(side) is not None for side in sides]
    if len(sides) == 3:
        # of a formula between the ends, such as 0 < 2x < 1, the brackets say which
        formula = "" if is_name[1] else re.sub(r"\s+", "", sides[1])
        return sides[0], sides[2], "(["[closed[0]] + formula + ")]"[closed[1]], sides[1]
    if absolute := _ABSOLUTE.fullmatch(sides[0]):
        return f"-({sides[1]})", sides[1], "(["[closed[0]] + ")]"[closed[0]], absolute[1]
    if is_name == [True, False]:
        return r"-\infty", sides[1], "(" + ")]"[closed[0]], sides[0]
    if is_name == [False, True]:
        return sides[0], r"\infty", "(["[closed[0]] + ")", sides[1]
    return None


def _marks(text: str, sides: list[str]) -> list[str]:
    marks, at = [], 0
    for side in sides[:-1]:
        at = text.index(side, at) + len(side)
        match = _RELATION.search(text, at)
        assert match is not None
        marks.append(match[0])
        at = match.end()
    return marks


def _bracketed(text: str) -> Node | None:
    """A tuple, set or interval; brackets around one formula are idle."""
    opening, closing = (r"\{", r"\}") if text.startswith(r"\{") else (text[0], text[-1])
    if opening not in ("(", "[", r"\{") or not text.endswith((")", "]", r"\}")):
        return None
    inner = text[len(opening) : -len(closing)]
    if not _is_balanced(inner):
        return None
    parts = _split(inner, re.compile("[,;]"))
    if opening == r"\{":
        condition = _split(inner, re.compile(r"[|:]"))
        if len(condition) == 2 and NAME.match(condition[0]):  # {x | x > 3}
            return parse(condition[1])
        return _of_items(Kind.SET, text, [part for part in parts if part])
    if len(parts) == 1:
        return parse(inner) if (opening, closing) == ("(", ")") else None
    if len(parts) == 2 and opening + closing in ("[)", "(]"):
        return _of_items(Kind.INTERVAL, text, parts, opening + closing)
    return _of_items(Kind.TUPLE, text, parts, opening + closing)


def formulas_of(node: Node) -> list[str]:
    """The formulas in it, which only a parser can read."""
    if node.kind is Kind.FORMULA:
        return [node.text]
    return [formula for item in node.items for formula in formulas_of(item)]
