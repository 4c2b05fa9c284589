"""When two mathematical answers are equal: level by level, down to numbers and formulas."""

import re
from collections.abc import Callable
from dataclasses import replace

from r1pipe.rewards.answers.number import same_number
from r1pipe.rewards.answers.structure import NAME, Kind, Node

# Whether two formulas are equal, or two relations, of which `left - right` and the sign are given.
SameFormula = Callable[[str, str, str], bool]
_PLAIN = (Kind.LIST, Kind.SET)


class Comparison:
    """Compares two answers, given how formulas compare."""

    def __init__(self, same_formula: SameFormula):
        self.same_formula = same_formula
        self.names_matter = False  # of intervals: x > 0, y > 1

    def equal(self, gold: Node, answer: Node) -> bool:
        """Whether the answer as a whole equals the gold answer."""
        if (gold.kind is Kind.SET) != (answer.kind is Kind.SET):  # {7} is 7
            gold, answer = (node.items[0] if _has_one(node) else node for node in (gold, answer))
        bounded = ({item.name for item in node.items if item.name} for node in (gold, answer))
        self.names_matter = any(len(names) > 1 for names in bounded)
        if gold.kind in _PLAIN and answer.kind in _PLAIN:
            named = [item.kind is Kind.RELATION for item in (*gold.items, *answer.items)]
            names = [{_base_name(item) for item in node.items} for node in (gold, answer)]
            of_one_name = all(named) and names[0] == names[1] and len(names[0]) == 1
            if of_one_name or (any(named) and not all(named)):  # x_1 = 3, x_2 = -2 is x = 3, x = -2 and 3, -2
                gold, answer = (
                    replace(node, items=tuple(self.value(item) for item in node.items))
                    for node in (gold, answer)
                )
        return self.same(gold, answer)

    def same(self, a: Node, b: Node) -> bool:
        """Whether two nodes are equal, of whatever kind."""
        if a.number and b.number:
            return same_number(a.number, b.number)
        if Kind.SEQUENCE in (a.kind, b.kind):
            return a.kind == b.kind and a.text == b.text
        if a.kind is b.kind is Kind.RELATION:
            return self.same_relation(a, b)
        if Kind.RELATION in (a.kind, b.kind):
            values = self.value(a), self.value(b)
            return values != (a, b) and self.same(*values)
        if a.items or b.items or Kind.SET in (a.kind, b.kind):
            if a.kind is b.kind is Kind.SET:
                return self.contains(a, b) and self.contains(b, a)
            return len(a.items) == len(b.items) and self.same_items(a, b)
        return self.same_formula(_formula(a), _formula(b), "")

    def same_items(self, a: Node, b: Node) -> bool:
        """Collections of equal length: only tuples and intervals keep an order."""
        kinds = {a.kind, b.kind}
        if Kind.INTERVAL in kinds:  # (0, 1) is an interval or a pair, as the other has it
            is_same_name = a.name == b.name or not self.names_matter
            return a.mark == b.mark and is_same_name and all(map(self.same, a.items, b.items))
        if Kind.TUPLE in kinds:  # the brackets may be missing
            has_brackets = a.mark == b.mark or (
                Kind.LIST in kinds and not _is_closed(a) and not _is_closed(b)
            )
            return has_brackets and kinds <= {Kind.TUPLE, Kind.LIST} and all(map(self.same, a.items, b.items))
        if not (kinds <= {Kind.UNION, Kind.LIST} or kinds <= set(_PLAIN)):
            return False
        marks = {"or" if each.kind is Kind.UNION else each.mark for each in (a, b)} - {""}
        if len(marks) > 1 and any(_is_condition(item) for item in (*a.items, *b.items)):  # x < 0 and x > 1
            return False
        left = list(b.items)
        for item in a.items:
            partner = next((i for i, other in enumerate(left) if self.same(item, other)), None)
            if partner is None:
                return False
            del left[partner]
        return True

    def contains(self, a: Node, b: Node) -> bool:
        """Whether a set has each item of another."""
        return all(any(self.same(item, other) for item in a.items) for other in b.items)

    def same_relation(self, a: Node, b: Node) -> bool:
        if a.mark != b.mark:
            return False
        if len(a.items) != 2 or len(b.items) != 2:
            values = self.value(a), self.value(b)
            return values[0] is not a and values[1] is not b and self.same(*values)
        if a.mark == "=" and a.items[0].text == b.items[0].text:
            return self.same(a.items[1], b.items[1])
        return self.same_formula(_difference(a), _difference(b), a.mark)

    def value(self, node: Node) -> Node:
        """What a true equation says of a name (x = 5) or ends with (2 + 3 = 5); else the node."""
        if node.kind is not Kind.RELATION or node.mark != "=":
            return node
        *sides, last = node.items
        if len(sides) == 1 and _is_name(last) and sides[0].number:  # 5 = x
            return sides[0]
        if _is_name(sides[0]):
            sides = sides[1:]
        return last if all(self.same(side, last) for side in sides) else node


def _has_one(node: Node) -> bool:
    return node.kind is Kind.SET and len(node.items) == 1 and node.items[0].kind is not Kind.SET


def _is_closed(node: Node) -> bool:
    """Whether it may be a closed interval: [2, 5]."""
    return node.mark == "[]" and len(node.items) == 2


def _is_condition(node: Node) -> bool:
    return node.kind is Kind.INTERVAL or (node.kind is Kind.RELATION and node.mark == r"\ne")


def _formula(node: Node) -> str:
    """What the parser reads: a number without its unit; degrees it knows."""
    unit = node.number and node.number.unit
    return str(node.number.value) if node.number and unit and "arcdeg" not in unit.name else node.text


def _is_name(node: Node) -> bool:
    return node.number is None and NAME.fullmatch(node.text) is not None


def _base_name(node: Node) -> str:
    """x of `x_1 = 3`."""
    return re.sub(r"_.*", "", node.items[0].text) if node.items else ""


def _difference(relation: Node) -> str:
    left, right = (item.text for item in relation.items)
    return f"({left}) - ({right})"
