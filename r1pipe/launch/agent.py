"""Starts a host's ranks, and ends them. pdsh or srun runs `python -m r1pipe.launch.agent RUN N TOKEN` there.

N counts hosts from 0. It knows its ranks by their pids, so it ends them and what they started, and nothing
else. It does so where the command asks for it in the run folder, where another launch has taken the run, and
where one of its ranks has failed: the others wait for that one. A signal asks all ranks to save and leave.

Its exit code is that of the first rank that failed. DeepSpeed's own launcher of each host is not used: on
SIGTERM it sends ranks a second signal while they save, and it does not tell which rank was killed.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from r1pipe.core.paths import RunFolder
from r1pipe.runs import agents, locks, processes, stopping
from r1pipe.runs.agents import Agent, Orders

POLL_S = 0.2
BEAT_S = 5.0
LEAVING_S = 3.0  # for ranks to end by themselves
STALE_S = 60.0  # a file server's news may take so long to come
ORDERS_CODE = 2  # exit codes
ENDED_CODE = 128 + signal.SIGTERM


def main(words: list[str]) -> int:
    """Exit code of the host's ranks."""
    path, node, token = words
    run = RunFolder(path)
    host = Host(run, orders_of(run, int(node), token), int(node))
    for number in stopping.SIGNALS:
        signal.signal(number, partial(on_signal, run))
    return host.follow()


def on_signal(run: RunFolder, number: int, frame: FrameType | None) -> None:
    """Ranks look at that file; those that got the signal, too, take both for one request."""
    if not run.stop.exists():
        stopping.request(run.stop, number)


def refuse(code: int, line: str) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(code)


def orders_of(run: RunFolder, node: int, token: str) -> Orders:
    """The orders of this launch. Raises SystemExit where they do not come, or cannot be followed here."""
    name = os.uname().nodename
    if not run.log.is_dir():
        refuse(agents.NO_FOLDER_CODE, f"{name} does not see the run folder {run.path}")
    ends_at = time.monotonic() + STALE_S
    while (orders := Orders.read(run)) is None or {orders.token, locks.token_of(run)} != {token}:
        if time.monotonic() > ends_at:
            refuse(agents.NO_FOLDER_CODE, f"{name} does not see this launch's {run.orders}")
        time.sleep(POLL_S)
    for path in (Path(orders.folder), Path(orders.script)):
        if not path.exists():
            refuse(ORDERS_CODE, f"{name} has no {path}, which the launching machine has")
    return orders


def own_address(variables: os._Environ | dict[str, str]) -> str:
    """Where other hosts reach this one: the address at which ssh did, if that is one of a network."""
    if "SLURMD_NODENAME" in variables:
        return variables["SLURMD_NODENAME"]
    reached = variables.get("SSH_CONNECTION", "").split()[2:3]
    if reached and not reached[0].startswith(("127.", "::1")):
        return reached[0]
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
    return next(iter(done.stdout.split()), os.uname().nodename)


class Host:
    """The ranks of this host."""

    def __init__(self, run: RunFolder, orders: Orders, node: int):
        self.run, self.orders, self.node = run, orders, node
        self.shown = Agent(node, orders.token)
        self.ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._ended_here: set[int] = set()  # ranks
        self._shown_at, self._kill_at = 0.0, float("inf")

    def follow(self) -> int:
        """Start the ranks, and wait until all have ended."""
        if self.node == 0:
            self.shown.address = self.orders.master_addr or own_address(os.environ)
        self._show()
        address = self._meeting_place()
        if address:
            self._start(address)
        try:
            while len(self.shown.ended) < len(self.ranks):
                time.sleep(POLL_S)
                self._look()
        finally:
            self._kill()
        failed = [code for _, code in self.shown.ended if code]
        code = next(iter(failed), 0 if address else ENDED_CODE)
        self.shown.exit_code = code if code >= 0 else 128 - code
        self._show()
        return self.shown.exit_code

    def _meeting_place(self) -> str:
        """Where ranks meet, once the first host has said it; "" if they are not to."""
        while not self._must_end():
            first = self.shown if self.node == 0 else agents.read(self.run.agent(0))
            if first and first.token == self.orders.token and first.address:
                return first.address
            time.sleep(POLL_S)
            self._show_if_due()
        return ""

    def _start(self, address: str) -> None:
        orders, (_, count) = self.orders, self.orders.hosts[self.node]
        first = orders.first_rank(self.node)
        shared = {
            **os.environ,
            **orders.variables,
            locks.LAUNCH: orders.token,
            "MASTER_ADDR": address,
            "MASTER_PORT": str(orders.master_port),
            "WORLD_SIZE": str(orders.first_rank(len(orders.hosts))),
            "LOCAL_SIZE": str(count),
            "CROSS_RANK": str(self.node),
            "CROSS_SIZE": str(len(orders.hosts)),
        }
        for local in range(count):
            self.ranks[first + local] = subprocess.Popen(
                [sys.executable, "-u", orders.script, str(self.run.path)],
                env={**shared, "RANK": str(first + local), "LOCAL_RANK": str(local)},
                stdin=subprocess.DEVNULL,
                cwd=orders.folder,
            )

    def _look(self) -> None:
        known = {rank for rank, _ in self.shown.ended}
        codes = {rank: process.poll() for rank, process in self.ranks.items() if rank not in known}
        ended = [(rank, self._told(rank, code)) for rank, code in codes.items() if code is not None]
        self.shown.ended += ended
        if ended:
            self._show()
        has_failed = any(code and code not in stopping.EXIT_CODES for _, code in ended)
        if has_failed or self._must_end():
            self._kill_at = min(self._kill_at, time.monotonic() + LEAVING_S)
        if time.monotonic() > self._kill_at:
            self._kill()
        self._show_if_due()

    def _told(self, rank: int, code: int) -> int:
        """The exit code that is shown: a rank that this agent has ended did not fail."""
        return ENDED_CODE if rank in self._ended_here and code == -signal.SIGKILL else code

    def _must_end(self) -> bool:
        """Whether the command asks for it, or another launch has the run."""
        with suppress(OSError):  # a network's file system may be away for a while
            if stopping.is_at_once(self.run.stop):
                return True
            return locks.token_of(self.run) != self.orders.token
        return False

    def _kill(self) -> None:
        """The ranks that are left, and all that they have started."""
        for rank, process in self.ranks.items():
            if process.poll() is None:
                self._ended_here.add(rank)
                processes.kill_tree(process.pid)

    def _show_if_due(self) -> None:
        if time.monotonic() - self._shown_at > BEAT_S:
            self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        self.shown.beats += 1
        with suppress(OSError):
            self.shown.show(self.run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
