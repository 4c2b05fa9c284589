"""Isolation for generated programs: no network, files or environment; time, memory, depth, output bounded.

Chosen by capability: pydantic-monty (a Python interpreter in Rust that has no system calls to give away, in
worker processes of its own), else bubblewrap around `python -I` (not for root, whose number of processes the
kernel does not limit), else the program is not run at all.

A program's fault (an exception, a limit, a worker that it brought down) is an outcome without results and
scores 0; INFRASTRUCTURE_FAILED means that the sandbox itself does not work, and is told apart by a control
program that must succeed.
"""

import atexit
import functools
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r1pipe.errors import EnvironmentProblem
from r1pipe.records import Status

if TYPE_CHECKING:
    import pydantic_monty

TIME_LIMIT_S = 1.0  # definition of the program, and again all its calls together
MEMORY_LIMIT = 64 << 20  # bytes of the program's own data
DEPTH_LIMIT = 400  # nested calls
OUTPUT_LIMIT = 64 << 10  # bytes printed, or (bubblewrap) returned
HANG_LIMIT_S = 5.0  # a worker that keeps no limit of its own is killed

CONTROL = ("def control(x):\n    return x + 1\n", "control", [[1]], [2])


@dataclass(frozen=True)
class Outcome:
    """What the calls returned, in order; `results` is None where the program failed, `detail` says how."""

    results: list[Any] | None
    detail: str = ""
    status: Status = Status.SCORED


Runner = Callable[[str, str, Sequence[Sequence[Any]]], Outcome]


def run(program: str, entry_point: str, arguments: Sequence[Sequence[Any]]) -> Outcome:
    """Define the program, call `entry_point` once per argument list, and give back what the calls returned.

    Raises EnvironmentProblem where this machine has no isolation to offer.
    """
    with _choosing:  # threads that come first together must not each start a pool
        runner = choose()
    return runner(program, entry_point, arguments)


_choosing = threading.Lock()


@functools.cache
def choose() -> Runner:
    """The isolation of this machine; the same one ever after."""
    if importlib.util.find_spec("pydantic_monty"):
        return Monty()
    if shutil.which("bwrap") and os.geteuid() != 0:
        return bubblewrap
    raise EnvironmentProblem(
        "no isolation for generated programs: run `pip install pydantic-monty`, or install bubblewrap (bwrap)"
        " and be a user other than root"
    )


class Monty:
    """Programs in pydantic-monty's worker processes; a session per program, workers used again."""

    def __init__(self) -> None:
        import pydantic_monty

        self.monty = pydantic_monty
        self.pool = pydantic_monty.Monty(request_timeout=HANG_LIMIT_S)
        self.pool.__enter__()
        atexit.register(self.pool.__exit__, None, None, None)

    def __call__(self, program: str, entry_point: str, arguments: Sequence[Sequence[Any]]) -> Outcome:
        monty = self.monty
        try:
            return Outcome(self._session(program, entry_point, arguments))
        except (monty.MontyCrashedError, monty.MontyDisconnectError, monty.MontyShutdown, OSError) as error:
            return self._blame(f"{type(error).__name__}: {error}")
        except monty.MontyError as error:
            detail = str(error)[:200]
            if "monty syntax parser does not yet support" in detail:
                return Outcome(None, detail, Status.VERIFIER_FAILED)
            return Outcome(None, detail)
        except (ValueError, RecursionError, OverflowError) as error:  # a result too large to cross over
            return Outcome(None, f"result: {str(error)[:200]}")

    def _session(self, program: str, entry_point: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        limits: pydantic_monty.ResourceLimits = {
            "max_feed_duration_secs": TIME_LIMIT_S,
            "max_memory": MEMORY_LIMIT,
            "max_recursion_depth": DEPTH_LIMIT,
            "max_suspensions": 100,  # sleeps and look-ups that fail
        }
        # no waiting, and the same verdict every time
        policy: pydantic_monty.OSPolicy = {"sleep": "zero", "random_start": {"seed": 0}}
        with self.pool.checkout(limits=limits, os_policy=policy) as session:
            output = self.monty.CollectString(max_bytes=OUTPUT_LIMIT)
            session.feed_run(program, print_callback=output)
            calls, inputs = f"[{entry_point}(*each) for each in _arguments]", {"_arguments": list(arguments)}
            return session.feed_run(calls, inputs=inputs, print_callback=output)

    def _blame(self, detail: str) -> Outcome:
        """A worker went down: the program's fault if the control program still runs, else the sandbox's."""
        program, entry_point, arguments, expected = CONTROL
        try:
            working = self._session(program, entry_point, arguments) == expected
        except (self.monty.MontyError, OSError) as error:
            return Outcome(None, f"{detail}; control program: {error}", Status.INFRASTRUCTURE_FAILED)
        return Outcome(None, detail, Status.SCORED if working else Status.INFRASTRUCTURE_FAILED)


# Runs inside bubblewrap: limits first, then the program; the results are written as JSON after a mark. A
# program that forged them would gain nothing, as it never sees the expected values.
_HARNESS = """
import json, resource, sys
request = json.load(sys.stdin)
for name, value in request["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
sys.setrecursionlimit(request["depth"])
space = {"__name__": "program"}
exec(compile(request["program"], "program", "exec"), space)
results = [space[request["entry_point"]](*each) for each in request["arguments"]]
print("\\n" + request["mark"] + json.dumps(results), file=sys.__stdout__, flush=True)
"""
_MARK = "r1pipe-results:"


def bubblewrap(program: str, entry_point: str, arguments: Sequence[Sequence[Any]]) -> Outcome:
    """One `python -I` per program (about 50 ms); it can read Python itself and write nowhere."""
    outcome = _bubblewrap(program, entry_point, arguments)
    if outcome.results is None and outcome.status is Status.SCORED:
        control = _bubblewrap(*CONTROL[:3])
        if control.results != CONTROL[3]:
            return Outcome(None, f"bubblewrap fails here: {control.detail}", Status.INFRASTRUCTURE_FAILED)
    return outcome


def _bubblewrap(program: str, entry_point: str, arguments: Sequence[Sequence[Any]]) -> Outcome:
    limits = {
        "RLIMIT_CPU": math.ceil(2 * TIME_LIMIT_S),
        "RLIMIT_AS": MEMORY_LIMIT + (256 << 20),  # the interpreter itself comes on top
        "RLIMIT_FSIZE": OUTPUT_LIMIT,  # its output is a file outside
        "RLIMIT_NPROC": 1,
        "RLIMIT_CORE": 0,
    }
    request = {"program": program, "entry_point": entry_point, "arguments": arguments, "mark": _MARK}
    text = json.dumps(request | {"limits": limits, "depth": DEPTH_LIMIT}).encode()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            code = subprocess.run(
                _command(), input=text, stdout=out, stderr=err, timeout=HANG_LIMIT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return Outcome(None, "time limit")
        except OSError as error:
            return Outcome(None, str(error), Status.INFRASTRUCTURE_FAILED)
        out.seek(0)
        err.seek(0)
        *_, last = [b"", *out.read(OUTPUT_LIMIT).strip().splitlines()]
        fault = err.read(OUTPUT_LIMIT).decode(errors="replace").strip().splitlines()
    if code != 0 or not last.startswith(_MARK.encode()):
        return Outcome(None, fault[-1][:200] if fault else f"exit code {code}, no result")
    try:
        return Outcome(json.loads(last[len(_MARK) :]))
    except (ValueError, RecursionError) as error:  # forged
        return Outcome(None, f"result: {error}")


def _command() -> list[str]:
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--cap-drop", "ALL", "--proc", "/proc", "--chdir", "/"]
    for folder in ("/usr", "/lib", "/lib64", sys.base_prefix):
        command += ["--ro-bind-try", folder, folder]
    return [*command, "--remount-ro", "/", os.path.realpath(sys.executable), "-I", "-S", "-c", _HARNESS]
