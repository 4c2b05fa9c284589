"""What every isolation of generated programs has in common: limits, the three ways to fail, and a session.

A session is a fresh interpreter that a program cannot leave: `monty.py` and `jail.py` make them, and
`sandbox.py` chooses.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

TIME_LIMIT_S = 1.0  # definition of the program, and again each request to it
MEMORY_LIMIT = 64 << 20  # bytes of the program's own data
DEPTH_LIMIT = 400  # nested calls in Monty
OUTPUT_LIMIT = 64 << 10  # bytes printed, or of one reply
HANG_LIMIT_S = 5.0  # an interpreter that keeps no limit of its own is killed
CHECK_LIMIT_S = 10.0  # all the tests of one program together

Host = Mapping[str, Callable[..., Any]]  # functions of this process that code in a session may call


class ProgramFault(Exception):
    """The program's own doing: an exception, a limit, an interpreter that it brought down.

    `final`: no other interpreter would judge it differently (a limit, something that no program may do).
    """

    def __init__(self, detail: str, final: bool = False):
        super().__init__(detail[:200])
        self.final = final


class Unsupported(Exception):
    """This interpreter lacks something of Python that the program may rightly use."""


class Broken(Exception):
    """The isolation itself does not work."""


class Session(Protocol):
    """One interpreter; names that code defines stay until it ends."""

    def run(self, code: str, inputs: Mapping[str, Any] | None = None, host: Host | None = None) -> Any:
        """The value of the code's last line, if that is an expression; plain data only.

        Raises ProgramFault, Unsupported or Broken.
        """


class Isolation(Protocol):
    def session(self, time_limit_s: float) -> AbstractContextManager[Session]:
        """A fresh interpreter whose requests may each take as long. Raises Broken."""


def plain(value: Any) -> Any:
    """The value, of built-in types alone. Raises ProgramFault: an object of the program's own has no say
    (one that equals everything would be right everywhere)."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
        return kind(map(plain, value))
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    raise ProgramFault(f"the program returns a {type(value).__name__}, which is no plain value")
