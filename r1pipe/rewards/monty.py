"""Programs in pydantic-monty: a Python interpreter in Rust that has no system calls to give away.

Its workers are processes of their own, and a session takes well under a millisecond; but it is a part of
Python: no `del`, `yield` or inheritance, a dozen modules. What it lacks is told apart from what is wrong.
"""

import atexit
import builtins
import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from r1pipe.rewards import isolation
from r1pipe.rewards.isolation import Broken, Host, ProgramFault, Unsupported

if TYPE_CHECKING:
    import pydantic_monty

# Of the standard library, what a program that is only to compute may use; the rest is refused, not lacking.
HARMLESS = {
    *(
        "abc",
        "array",
        "base64",
        "binascii",
        "bisect",
        "calendar",
        "cmath",
        "collections",
        "contextlib",
        "copy",
    ),
    *(
        "dataclasses",
        "datetime",
        "decimal",
        "difflib",
        "enum",
        "fractions",
        "functools",
        "graphlib",
        "hashlib",
    ),
    *(
        "heapq",
        "io",
        "itertools",
        "json",
        "keyword",
        "math",
        "numbers",
        "operator",
        "pprint",
        "queue",
        "random",
    ),
    *("re", "statistics", "string", "struct", "textwrap", "time", "types", "typing", "unicodedata", "zlib"),
}
REFUSED_NAMES = {"open", "input", "exit", "quit", "breakpoint", "help", "compile", "__import__", "globals"}
KILLED = f"(signal: {signal.SIGKILL:d} "  # how Monty words a crash; it hands out no number
_LEAVING = re.compile(r"\b(?:SystemExit|KeyboardInterrupt|GeneratorExit)\b")
_LIMITS = ("TimeoutError", "MemoryError")
_MODULE = re.compile(r"No module named '([\w.]+)'")
_NAME = re.compile(r"name '(\w+)' is not defined")
_ATTRIBUTE = re.compile(r"(type object |module )?'(\w+)' (?:object )?has no attribute '(\w+)'")


class Monty:
    """A pool of worker processes; a session per program, workers used again."""

    def __init__(self) -> None:
        import pydantic_monty

        self.monty = pydantic_monty
        # a check holds two sessions at once: more of them than threads, or all would wait for each other
        most = max(16, os.cpu_count() or 1)
        self.pool = pydantic_monty.Monty(request_timeout=isolation.HANG_LIMIT_S, max_processes=most)
        self.pool.__enter__()
        atexit.register(self.pool.__exit__, None, None, None)

    @contextmanager
    def session(self, time_limit_s: float) -> Iterator["MontySession"]:
        limits: pydantic_monty.ResourceLimits = {
            "max_feed_duration_secs": time_limit_s,
            "max_memory": isolation.MEMORY_LIMIT,
            "max_recursion_depth": isolation.DEPTH_LIMIT,
            "max_suspensions": 10_000,  # sleeps, look-ups that fail, calls of host functions
        }
        # no waiting, and the same verdict every time
        policy: pydantic_monty.OSPolicy = {"sleep": "zero", "random_start": {"seed": 0}}
        try:
            with self.pool.checkout(limits=limits, os_policy=policy) as inner:
                yield MontySession(self, inner)
        except (self.monty.MontyError, OSError) as error:
            raise self.blame(error) from None

    def blame(self, error: Exception) -> Exception:
        """A worker went down: the program's fault if another one still works, else the sandbox's.

        Killed by SIGKILL, and not for its time, it was by somebody outside: no program can send that.
        """
        detail = f"{type(error).__name__}: {error}"
        if isinstance(error, self.monty.MontyCrashedError) and not error.timed_out and KILLED in str(error):
            return Broken(detail[:200])
        try:
            with self.pool.checkout() as inner:
                working = inner.feed_run("1 + 1") == 2
        except (self.monty.MontyError, OSError) as problem:
            return Broken(f"{detail}; control program: {problem}"[:200])
        return ProgramFault(detail, final=True) if working else Broken(detail[:200])


class MontySession:
    """See isolation.Session."""

    def __init__(self, owner: Monty, inner: "pydantic_monty.MontySession"):
        self.owner, self.inner = owner, inner
        self.code = ""

    def run(self, code: str, inputs: Mapping[str, Any] | None = None, host: Host | None = None) -> Any:
        monty = self.owner.monty
        self.code += code
        output = monty.CollectString(max_bytes=isolation.OUTPUT_LIMIT)
        try:
            return self.inner.feed_run(
                code, inputs=dict(inputs or {}), external_lookup=dict(host or {}), print_callback=output
            )
        except (monty.MontyCrashedError, monty.MontyDisconnectError, monty.MontyShutdown, OSError) as error:
            raise self.owner.blame(error) from None
        except monty.MontyError as error:
            raise self._fault(str(error), str(error.exception())) from None
        except (ValueError, RecursionError, OverflowError, TypeError) as error:  # what cannot cross over
            raise ProgramFault(f"result: {error}") from None

    def _fault(self, told: str, message: str) -> Exception:
        """What an exception inside means. `told` names its type, unless an assert failed."""
        if "does not yet support" in told:
            return Unsupported(told[:200])
        if told.startswith(_LIMITS):
            return ProgramFault(told, final=True)
        if "Internal error in monty" in told:  # raise SystemExit(0), for one
            return ProgramFault(told, final=True) if _LEAVING.search(self.code) else Unsupported(told[:200])
        if refused := _refused(told, message):
            return ProgramFault(refused, final=True)
        return Unsupported(told[:200]) if _lacking(told, message) else ProgramFault(told)


def _refused(told: str, message: str) -> str:
    if told.startswith("PermissionError"):
        return told
    if (found := _MODULE.search(message)) and found[1].split(".")[0] not in HARMLESS:
        return f"{told}: no program may import it"
    if (found := _NAME.search(message)) and found[1] in REFUSED_NAMES:
        return f"{told}: no program may call it"
    return ""


def _lacking(told: str, message: str) -> bool:
    """Whether Python itself has the module, name, method or syntax; then the program may be right."""
    if _MODULE.search(message):
        return True  # a harmless one, or it had been refused
    if found := _NAME.search(message):
        return hasattr(builtins, found[1])
    if found := _ATTRIBUTE.search(message):
        kind, owner, name = found.groups()
        if kind == "module ":
            return owner in HARMLESS & sys.stdlib_module_names and hasattr(
                importlib.import_module(owner), name
            )
        return hasattr(getattr(builtins, owner, None), name)
    return told.startswith(("SyntaxError", "Expected"))  # the extraction let nothing through but Python
