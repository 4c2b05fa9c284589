"""What all isolations of generated programs share: how they fail, and a session.

A session is a fresh interpreter that a program cannot leave: `monty.py` and `jail.py` make them, and
`sandbox.py` chooses.

Time is the processor time of the interpreter's own process between a request and its reply, read from
outside, so that no verdict depends on the machine's load. A program that sleeps is ended as well
(worker_process.py).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

OUT_OF_TIME = "the limit of processor time"

Host = Mapping[str, Callable[..., Any]]  # functions of this process that code in a session may call
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))


class ProgramFault(Exception):
    """The program failed: an exception, a limit, an interpreter that it crashed.

    `ended`: the interpreter is gone or cannot be trusted, so the session answers no further request.
    """

    def __init__(self, detail: str, ended: bool = False):
        super().__init__(detail[:200])
        self.ended = ended


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

    def run_script(self, script: str, stdin: str) -> str:
        """What a program that is run as `__main__` writes to standard output. Raises as `run`."""


class Isolation(Protocol):
    def session(self, cpu_s: float, memory: int) -> AbstractContextManager[Session]:
        """A fresh interpreter with so much processor time for each request, and so many bytes of its own.

        Raises SandboxBroken.
        """


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
