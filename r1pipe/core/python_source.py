"""Reading Python source: what models and tasks write is parsed here, and only here."""

import ast
import threading
from typing import Any

# CPython 3.11.0 to 3.11.7 and 3.12.0 to 3.12.1 count the depth of all threads' trees together, and raise
# SystemError where the counts cross (python/cpython#106905).
_ONE_AT_A_TIME = threading.Lock()


def parse(text: str | bytes) -> ast.Module:
    """Raises what ast.parse raises: SyntaxError, ValueError, RecursionError or MemoryError."""
    with _ONE_AT_A_TIME:
        return ast.parse(text)


def parse_expression(text: str) -> ast.Expression:
    """As `parse`, of a text that is one expression."""
    with _ONE_AT_A_TIME:
        return ast.parse(text, mode="eval")


def literal(text: str) -> Any:
    """The value of a literal: number, string, list, dict ...; raises as `parse`."""
    try:
        return ast.literal_eval(parse_expression(text.strip()))
    except TypeError as error:  # {[1]: 2}
        raise ValueError(str(error)) from None
