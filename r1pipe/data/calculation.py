"""An expression calculated step by step, as one does on paper: a number at a time, a place at a time.

Sample: "58 + 67" -> "58 + 67 = 118 + 7 = 125" and "(39 + 12) / 3" -> "(39 + 12) / 3 = (49 + 2) / 3 = 51 / 3 =
10 + 21 / 3 = 10 + 7 = 17". A small model knows sums of one digit and a round number, and guesses those of two
numbers of two digits.
"""

import ast

OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
RANK = {"+": 1, "-": 1, "*": 2, "/": 2}
LONGEST = 20  # expressions in a row; what takes more is not calculated here

Node = int | tuple[str, "Node", "Node"]  # a number, or an operator with its operands


def calculate(expression: str) -> str | None:
    """The expression, each step and the value, joined by " = "; None for what is not made of whole numbers
    that are at least 0 (nor its steps), joined by + - * / and brackets."""
    try:
        node = _tree(ast.parse(expression.strip(), mode="eval").body)
        steps = [_text(node)]
        while not isinstance(node, int):
            node = _step(node)
            steps.append(_text(node))
            if len(steps) > LONGEST:
                return None
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return " = ".join(steps)


def _tree(node: ast.expr) -> Node:
    """Raises ValueError for what is no arithmetic of whole numbers."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return (OPERATORS[type(node.op)], _tree(node.left), _tree(node.right))
    raise ValueError


def _step(node: tuple[str, Node, Node]) -> Node:
    """The tree with one operation, the leftmost whose operands are numbers, taken a step further."""
    sign, left, right = node
    if not isinstance(left, int):
        return (sign, _step(left), right)
    if not isinstance(right, int):
        return (sign, left, _step(right))
    return {"+": _add, "-": _subtract, "*": _multiply, "/": _divide}[sign](left, right)


def _first_place(number: int) -> int:
    """The number with all digits but the first at 0: 67 -> 60."""
    place: int = 10 ** (len(str(number)) - 1)
    return number // place * place


def _add(left: int, right: int) -> Node:
    first = _first_place(right)
    only_joins = left % 10 ** len(str(right)) == 0  # 100 + 98
    return left + right if right == first or left < 10 or only_joins else ("+", left + first, right - first)


def _subtract(left: int, right: int) -> Node:
    """Raises ValueError below 0."""
    if left < right:
        raise ValueError
    first = _first_place(right)
    return left - right if right == first else ("-", left - first, right - first)


def _multiply(left: int, right: int) -> Node:
    """The factor of more digits by its places; of two long ones the second."""
    whole, factor = (right, left) if left < 10 or right >= 10 else (left, right)
    first = _first_place(whole)
    if whole == first:
        return left * right
    rest = whole - first
    product: Node = ("*", rest, factor) if factor < 10 else ("*", factor, rest)
    return ("+", first * factor, rest * factor if rest < 10 and factor < 10 else product)


def _divide(left: int, right: int) -> Node:
    """The quotient by its places. Raises ValueError where something is left over, ZeroDivisionError."""
    quotient, left_over = divmod(left, right)
    if left_over:
        raise ValueError
    first = _first_place(quotient)
    return quotient if quotient == first else ("+", first, ("/", left - first * right, right))


def _text(node: Node) -> str:
    if isinstance(node, int):
        return str(node)
    sign, left, right = node
    return f"{_operand(left, sign, False)} {sign} {_operand(right, sign, True)}"


def _operand(node: Node, sign: str, is_right: bool) -> str:
    """An operand's text, in brackets where its own operation would otherwise come later."""
    needed = not isinstance(node, int) and RANK[node[0]] < RANK[sign] + (is_right and sign in "-/")
    return f"({_text(node)})" if needed else _text(node)
