"""The structure of a mathematical answer: lists, tuples, sets, intervals, unions and relations of formulas.

It is read from a tidy text without a formula parser; `comparison.py` compares two.
"""

import re
from dataclasses import dataclass, field
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
NAME = re.compile(r"(?:\\?[A-Za-z]+|[一-鿿]+)'?(?:_\{?\w+\}?)?(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?")
REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|(?:all )?real numbers|(?:全体|一切|任意)实数")
_TWO_NUMBERS = re.compile(r"(?<![_^\d])(?<!\\frac )\d+\s+\d")
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
    number: Number | None = field(default=None, compare=False)


@lru_cache(maxsize=4096)
def parse(text: str) -> Node | None:
    """The structure of a tidy text; None where brackets do not match or something is missing."""
    text = text.strip().rstrip(".;,").strip()
    if not text:
        return None
    if number := read_number(text):
        return Node(Kind.NUMBER, text, number=number)
    if not _is_balanced(text) or _TWO_NUMBERS.search(text):
        return None
    if REALS.fullmatch(text):
        return parse(r"(-\infty, \infty)")
    if r"\ldots" in text or "..." in text:
        return Node(Kind.SEQUENCE, re.sub(r"\s+", "", text.replace("...", r"\ldots")))
    if r"\cup" in text and len(parts := _split(text, re.compile(r"\\cup(?![A-Za-z])"))) > 1:
        return _of_items(Kind.UNION, text, parts)
    parts = _split(text, _LIST_SEPARATOR)
    if len(parts) > 1:
        return _list(text, parts)
    if node := _relation(text) or _bracketed(text):
        return node
    if _PLUS_MINUS.search(text):
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-").removeprefix("+")
        return _of_items(Kind.LIST, text, [upper, text.replace(r"\pm", "-").replace(r"\mp", "+")])
    return Node(Kind.FORMULA, text)


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
    """`2, 3`, `x = 2 or x = 3`, and `m = 3, 4, 5`, where the name belongs to all."""
    first = _split(parts[0], _RELATION)
    others_have_none = not any(_RELATION.search(part) for part in parts[1:])
    if len(first) == 2 and NAME.fullmatch(first[0]) and "=" in parts[0] and others_have_none:
        parts = [first[1], *parts[1:]]
    return _of_items(Kind.LIST, text, parts)


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
        low, high, brackets = ends
        return _of_items(Kind.INTERVAL, text, [low, high], brackets)
    if len(sides) == 2 or set(marks) == {"="}:  # 2 + 3 = 4 + 1 = 5 too
        return _of_items(Kind.RELATION, text, sides, marks[0])
    return None


def _range(sides: list[str], closed: list[bool]) -> tuple[str, str, str] | None:
    """`a < x <= b`, `x < b` and `a < x` as ends and brackets; None where no name is bounded."""
    is_name = [NAME.fullmatch(side) is not None for side in sides]
    if len(sides) == 3:
        return sides[0], sides[2], "(["[closed[0]] + ")]"[closed[1]]
    if is_name == [True, False]:
        return r"-\infty", sides[1], "(" + ")]"[closed[0]]
    if is_name == [False, True]:
        return sides[0], r"\infty", "(["[closed[0]] + ")"
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
