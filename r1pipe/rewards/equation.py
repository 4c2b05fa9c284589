"""Partial credit for word problems: is the last equation of the thought the right one, and is it true?

Sample: gold answer 12; "15 - 3 = 13" earns `equation`, "15 + 3 = 18" earns `calculation`, "13 = 13" neither.
They are no rewards of R1's: a small model chooses the operation and calculates about equally badly, and an
answer alone does not tell which of the two was wrong.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from r1pipe.chat.template import parse
from r1pipe.core import python_source
from r1pipe.core.types import Completion, Prompt, Score

LONGEST = 200  # characters of an expression; of a longer one, the last
CLOSE = Fraction(1, 1_000)  # relative: gold answers are rounded
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_EQUATIONS = re.compile(r"(?:[-+*/×÷().\d $=]|,(?=\d))+")  # one or more in a row
_SENTENCE_END = re.compile(r"\.\s|[\n;]")


def equation(prompt: Prompt, completion: Completion) -> Score | None:
    """1 where the left side of the last equation calculates to the gold answer; None where that is no number.
    Of equations in a row (58 + 67 = 118 + 7 = 125) it is the first left side. A single number is none."""
    gold = _gold(prompt)
    if gold is None:
        return None
    sides = _last_equation(completion)
    value = value_of(sides[0]) if sides else None
    return Score(float(value is not None and _is_close(value, gold)))


def calculation(prompt: Prompt, completion: Completion) -> Score | None:
    """1 where all sides of the last equation have one value, whether or not it is the right equation; None
    where the gold answer is no number."""
    if _gold(prompt) is None:
        return None
    sides = _last_equation(completion)
    left = value_of(sides[0]) if sides else None
    others = [value_of(f"0 + ({side})") for side in sides[1:]]
    is_true = left is not None and all(value is not None and _is_close(value, left) for value in others)
    return Score(float(is_true))


def _gold(prompt: Prompt) -> Fraction | None:
    try:
        return Fraction((prompt.answer or "").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _is_close(value: Fraction, other: Fraction) -> bool:
    return abs(value - other) <= CLOSE * abs(other)


def _last_equation(completion: Completion) -> list[str]:
    """Its sides, two or more; empty without an equation."""
    sentences = _SENTENCE_END.split(parse(completion.text).reasoning)
    rows = [row for sentence in sentences for row in _EQUATIONS.findall(sentence)]
    sides = [[side[-LONGEST:] for side in row.split("=") if side.strip()] for row in rows]
    return next((row for row in reversed(sides) if len(row) > 1), [])


def value_of(expression: str) -> Fraction | None:
    """The value of numbers joined by + - * / and brackets; None for anything else."""
    text = expression.replace("×", "*").replace("÷", "/").translate({ord(","): None, ord("$"): None})
    if "**" in text or "//" in text:
        return None
    try:
        tree = python_source.parse_expression(text.strip()).body
        return _value(tree) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> Fraction:
    """Raises ValueError for what is no arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError
