"""Reading Python source: what models and tasks write is parsed here, and only here."""

import ast
import threading
from typing import Any

# CPython 3.11, before the fix of python/cpython#106905, counts the depth of all threads' trees together, and
# raises SystemError where the counts cross. Reentrant: a finalizer may parse while its own thread does.
_ONE_AT_A_TIME = threading.RLock()


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
