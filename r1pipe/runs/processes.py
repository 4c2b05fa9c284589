"""Which processes are alive, and how one ended."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

CLOCK_S = 2.0  # start times shift by so much when the system clock is adjusted
DELAY_FIELD = 1  # of /proc/PID/task/TID/schedstat
NANO = 1e-9
EXIT_CODE_FIELD = 52  # of /proc/PID/stat, counted from 1 as in proc(5)


def began(pid: int) -> float:
    """Start time of a process, seconds since 1970. Raises psutil.NoSuchProcess."""
    return psutil.Process(pid).create_time()


def status(pid: int, began_at: float) -> str | None:
    """psutil's status of the process with this pid and start time; None if it is gone."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - began_at) < CLOCK_S:
            return process.status()
    return None


def is_alive(pid: int, began_at: float) -> bool:
    """Whether that process still runs; its pid may be another's by now."""
    return status(pid, began_at) not in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class Foreign:
    """The launcher of a job that another command started, as far as `subprocess.Popen` can show it."""

    def __init__(self, pid: int, began_at: float, has_ranks: Callable[[], bool]):
        """`has_ranks`: whether ranks of the job are alive: they may outlive a launcher that is killed."""
        self.pid, self._began_at, self._has_ranks = pid, began_at, has_ranks

    def poll(self) -> int | None:
        """None while the job runs, then 0: only its parent can get the exit code."""
        return None if is_alive(self.pid, self._began_at) or self._has_ranks() else 0


def exit_code(pid: int) -> int | None:
    """Exit code of a zombie, negative for a signal; None if the system does not show it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[EXIT_CODE_FIELD - 3]))  # two fields precede the parenthesis


def delays() -> dict[int, float]:
    """Thread of this process -> seconds that it was ready to run and had no core; empty where the system does
    not show it."""
    found = {}
    with suppress(FileNotFoundError):
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError, IndexError):  # it has just ended
                found[int(task.name)] = NANO * int((task / "schedstat").read_text().split()[DELAY_FIELD])
    return found


def group(leader: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    members = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def kill_tree(pid: int) -> None:
    """A process, and all that it has started and that has not left it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                member.kill()
