"""What all isolations of generated programs share: limits, the three ways to fail, and a session.

A session is a fresh interpreter that a program cannot leave: `monty.py` and `jail.py` make them, and
`sandbox.py` chooses.

Time is the processor time of the interpreter's own process, so no verdict depends on the machine's load.
A program that sleeps is ended as well (worker_process.py).
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

CPU_LIMIT_S = 1.0  # definition of the program, and again each request to it; rounded up to whole seconds
CHECK_CPU_LIMIT_S = 10.0  # all the tests of one program together, where the tests are Python text
MEMORY_LIMIT = 64 << 20  # bytes of the program's own data
DEPTH_LIMIT = 400  # nested calls in Monty
OUTPUT_LIMIT = 64 << 10  # bytes printed in Monty

Host = Mapping[str, Callable[..., Any]]  # functions of this process that code in a session may call
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))


class ProgramFault(Exception):
    """The program failed: an exception, a limit, an interpreter that it crashed.

    `final`: no other interpreter would decide differently (a limit, a forbidden operation).
    """

    def __init__(self, detail: str, final: bool = False):
        super().__init__(detail[:200])
        self.final = final


class Unsupported(Exception):
    """This interpreter lacks a part of Python that the program may use."""


class SandboxBroken(Exception):
    """The isolation itself does not work, or the machine is too busy for it."""


class Session(Protocol):
    """One interpreter; names that code defines stay until it ends."""

    def run(self, code: str, inputs: Mapping[str, Any] | None = None, host: Host | None = None) -> Any:
        """The value of the code's last line, if that is an expression; plain data only.

        Raises ProgramFault, Unsupported or SandboxBroken.
        """


class Isolation(Protocol):
    def session(self, cpu_limit_s: float) -> AbstractContextManager[Session]:
        """A fresh interpreter with this much processor time for a request. Raises SandboxBroken."""


def plain(value: Any) -> Any:
    """The value, of built-in types alone. Raises ProgramFault on any other object: one that equals everything
    would pass every test."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
        return kind(map(plain, value))
    if type(value) in _PLAIN_TYPES:
        return value
    raise ProgramFault(f"the program returns a {type(value).__name__}, which is not a plain value")


def same_value(result: object, expected: object) -> bool:
    """Python's ==, but floats to 1e-9 and lists like tuples (JSON knows only lists).

    Anything that is not a plain built-in value is never equal.
    """
    if isinstance(expected, list | tuple):
        if not isinstance(result, list | tuple) or len(result) != len(expected):
            return False
        return all(map(same_value, result, expected))
    if isinstance(expected, dict):
        if not isinstance(result, dict) or result.keys() != expected.keys():
            return False
        return all(same_value(result[key], expected[key]) for key in expected)
    if type(result) not in _PLAIN_TYPES:
        return False
    if isinstance(expected, float) and isinstance(result, int | float):
        small = abs(result) < 1e300  # a larger integer does not fit a float
        return result == expected or (small and math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12))
    return bool(result == expected)
