"""The structure of a mathematical answer: lists, tuples, sets, intervals, unions, equations; formulas are leaves.

`parse` reads it from a tidy text without a formula parser; `same` compares two, given how leaves compare.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

from r1pipe.rewards.answers.number import Number, read_number, same_number

SameFormula = Callable[[str, str, str], bool]
MAX_ITEMS = 60
_OPENING, _CLOSING = "([{", ")]}"
# a comma within 1,234 is none
_LIST_SEPARATOR = re.compile(
    r"(?:;|(?<!\d),|,(?!\d{3}(?!\d)))\s*(?:(?:and|or)\b|[和或])?|\s+(?:and|or)\s+|\s*[和或与]\s*"
)
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv)(?![A-Za-z])|<=|>=|!=|==|[=<>]")
_MEANS = {"<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "=", r"\approx": "="}
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_NAME = re.compile(r"(?:\\?[A-Za-z]+|[一-鿿]+)'?(?:_\{?\w+\}?)?(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?")
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
    if not _is_balanced(text):
        return None
    if _REALS.fullmatch(text):
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
        signs = [_PLUS_MINUS.sub(lambda m, s=s: s if m[0] == r"\pm" else "-+"[s == "-"], text) for s in "+-"]
        return _of_items(Kind.LIST, text, [sign.removeprefix("+") for sign in signs])
    return Node(Kind.FORMULA, text)


_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|(?:all )?real numbers|(?:全体|一切|任意)实数")


def _is_balanced(text: str) -> bool:
    """Whether every bracket has its partner; half-open intervals may close with the other kind."""
    stack: list[str] = []
    for character in re.sub(r"\\[{}]", lambda m: {r"\{": "(", r"\}": ")"}[m[0]], text):
        if character in _OPENING:
            stack.append(character)
        elif character in _CLOSING:
            if not stack or (stack.pop() == "{") != (character == "}"):
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
    complete = tuple(item for item in items if item is not None)
    return Node(kind, text, complete, mark) if len(complete) == len(items) else None


def _list(text: str, parts: list[str]) -> Node | None:
    """`2, 3`, `x = 2 or x = 3`, and `m = 3, 4, 5`, where the name belongs to all."""
    first = _split(parts[0], _RELATION)
    if len(first) == 2 and _NAME.fullmatch(first[0]) and "=" in parts[0] and not any("=" in p for p in parts[1:]):
        if not any(_RELATION.search(part) for part in parts[1:]):
            parts = [first[1], *parts[1:]]
    return _of_items(Kind.LIST, text, parts)


def _relation(text: str) -> Node | None:
    sides = _split(text, _RELATION)
    if len(sides) < 2 or not all(sides):
        return None
    marks = [_MEANS.get(mark, mark) for mark in _marks(text, sides)]
    if marks == [r"\in"]:
        return parse(sides[1])
    if len(sides) == 3 and set(marks) <= {"<", r"\le"}:  # a < x <= b
        brackets = ("(" if marks[0] == "<" else "[") + (")" if marks[1] == "<" else "]")
        return _of_items(Kind.INTERVAL, text, [sides[0], sides[2]], brackets)
    if len(sides) == 3 and set(marks) <= {">", r"\ge"}:
        brackets = ("(" if marks[1] == ">" else "[") + (")" if marks[0] == ">" else "]")
        return _of_items(Kind.INTERVAL, text, [sides[2], sides[0]], brackets)
    if set(marks) == {"="} and len(sides) > 2:  # 2 + 3 = 4 + 1 = 5
        return _of_items(Kind.RELATION, text, sides, "=")
    if len(sides) != 2:
        return None
    if marks[0] in (">", r"\ge"):
        sides, marks = sides[::-1], [_FLIPPED[marks[0]]]
    left, right = sides
    if marks[0] in ("<", r"\le"):  # a half line, where one side is a name
        closed = marks[0] == r"\le"
        if _NAME.fullmatch(left) and not _NAME.fullmatch(right):
            return _of_items(Kind.INTERVAL, text, [r"-\infty", right], "(" + ("]" if closed else ")"))
        if _NAME.fullmatch(right) and not _NAME.fullmatch(left):
            return _of_items(Kind.INTERVAL, text, [left, r"\infty"], ("[" if closed else "(") + ")")
    return _of_items(Kind.RELATION, text, sides, marks[0])


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
        if len(condition) == 2 and _NAME.match(condition[0]):  # {x | x > 3}
            return parse(condition[1])
        return _of_items(Kind.SET, text, [part for part in parts if part])
    if len(parts) == 1:
        return parse(inner) if (opening, closing) == ("(", ")") else None
    if len(parts) == 2 and opening + closing in ("[)", "(]"):
        return _of_items(Kind.INTERVAL, text, parts, opening + closing)
    return _of_items(Kind.TUPLE, text, parts, opening + closing)


def same(gold: Node, answer: Node, same_formula: SameFormula) -> bool:
    """Whether two answers are equal.

    `same_formula` compares two formulas, and two relations by `left - right` of each and their sign.
    """

    def equal(a: Node, b: Node) -> bool:
        if a.number and b.number:
            return same_number(a.number, b.number)
        if Kind.SEQUENCE in (a.kind, b.kind):
            return a.kind == b.kind and a.text == b.text
        if a.kind is Kind.RELATION or b.kind is Kind.RELATION:
            return related(a, b)
        if len(a.items) + len(b.items) == 1 and Kind.SET in (a.kind, b.kind):  # {7} is 7
            return equal((*a.items, a)[0], (*b.items, b)[0])
        if a.items or b.items:
            return collections(a, b)
        return same_formula(a.text, b.text, "")

    def collections(a: Node, b: Node) -> bool:
        if not (a.items and b.items) or len(a.items) != len(b.items):
            return False
        kinds = {a.kind, b.kind}
        if Kind.INTERVAL in kinds:  # `(0, 1)` is an interval or a pair, as the other has it
            return a.mark == b.mark and all(map(equal, a.items, b.items))
        if Kind.TUPLE in kinds:  # a list may lack its brackets, but not its order
            idle = kinds == {Kind.TUPLE, Kind.LIST}
            return (a.mark == b.mark or idle) and kinds <= {Kind.TUPLE, Kind.LIST} and all(map(equal, a.items, b.items))
        if kinds == {Kind.LIST, Kind.UNION} or kinds == {Kind.UNION} or kinds <= {Kind.LIST, Kind.SET}:
            return matched(a.items, b.items)
        return False

    def matched(a: tuple[Node, ...], b: tuple[Node, ...]) -> bool:
        """Whether each has its partner, in any order."""
        left = list(b)
        for item in a:
            partner = next((i for i, other in enumerate(left) if equal(item, other)), None)
            if partner is None:
                return False
            del left[partner]
        return True

    def related(a: Node, b: Node) -> bool:
        if a.kind is b.kind:
            if a.mark != b.mark:
                return False
            if a.mark == "=" and len(a.items) == len(b.items) == 2 and a.items[0].text == b.items[0].text:
                return equal(a.items[1], b.items[1])
            if len(a.items) != 2 or len(b.items) != 2:
                return equal(value(a), value(b)) if value(a) is not a and value(b) is not b else False
            return same_formula(difference(a), difference(b), a.mark)
        relation, other = (a, b) if a.kind is Kind.RELATION else (b, a)
        found = value(relation)
        return found is not relation and (equal(found, other) if relation is b else equal(other, found))

    def value(relation: Node) -> Node:
        """What a relation says of a name, `x = 5`, or ends with, `2 + 3 = 5`, where it is true; else itself."""
        *sides, last = relation.items
        if relation.mark != "=":
            return relation
        if len(sides) == 1 and _NAME.fullmatch(sides[0].text) and not sides[0].number:
            return last
        if len(sides) == 1 and _NAME.fullmatch(last.text) and not last.number and sides[0].number:
            return sides[0]  # 5 = x
        if _NAME.fullmatch(sides[0].text) and not sides[0].number:
            sides = sides[1:]
        return last if all(equal(side, last) for side in sides) else relation

    def difference(relation: Node) -> str:
        left, right = (item.text for item in relation.items)
        return f"({left}) - ({right})"

    if answer.kind in (Kind.LIST, Kind.SET) and gold.kind in (Kind.LIST, Kind.SET):
        named = [item.kind is Kind.RELATION for item in (*gold.items, *answer.items)]
        names = [{_base(i.items[0].text) for i in node.items if i.items} for node in (gold, answer)]
        of_one = all(named) and names[0] == names[1] and len(names[0]) == 1
        if (any(named) and not all(named)) or of_one:  # x_1 = 3, x_2 = -2 against 3, -2, and x = 3, x = -2
            gold, answer = (
                Node(node.kind, node.text, tuple(value(i) if i.kind is Kind.RELATION else i for i in node.items), node.mark)
                for node in (gold, answer)
            )
    return equal(gold, answer)


def _base(name: str) -> str:
    return re.sub(r"_.*", "", name)


def formulas_of(node: Node) -> list[str]:
    """The formulas in it, which only a parser can read."""
    if node.kind is Kind.FORMULA:
        return [node.text]
    return [formula for item in node.items for formula in formulas_of(item)]
