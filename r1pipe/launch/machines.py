"""What a job's machines tell: how their ranks have ended, by their agents, and which machine is lost.

pdsh and srun say in the launcher's log how an agent ended, at once where its connection broke. A machine that
goes without a word is noticed by ssh (launch.hosts.SSH_OPTIONS), or by its agent's file that stands still.
"""

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from r1pipe.core.paths import RunFolder
from r1pipe.runs import agents
from r1pipe.runs.agents import Agent, Orders
from r1pipe.runs.heartbeat import Beat

LOST_AFTER_S = 45.0  # an agent shows itself every five seconds, and computes nothing
LOST_CODE = 128 + signal.SIGKILL  # exit codes
UNUSABLE_CODE = 2
EXITED = re.compile(
    r"^(?:pdsh@\S+: (?P<ssh>\S+): ssh exited with exit code (?P<ssh_code>\d+)"
    r"|srun: error: (?P<node>\S+): tasks? \S+: Exited with exit code (?P<code>\d+))$",
    re.MULTILINE,
)
FEWER = ", also on fewer machines"
COMMAND = b"\n$ "  # begins the log of a session


@dataclass(frozen=True)
class Loss:
    line: str  # for the user
    code: int  # the job's exit code
    remedy: str = ""


class Machines:
    def __init__(self, run: RunFolder):
        self.run = run
        self.orders: Orders | None = None
        self.agents: dict[int, Agent] = {}  # by the number of their machine
        self._exits: dict[str, int] = {}  # machine -> exit code of its agent, as pdsh or srun says
        self._size = -1  # of the launcher's log when it was read
        self._beats: dict[int, tuple[int, float]] = {}  # machine -> (beats of its agent, since when)

    def look(self) -> None:
        """Read what is there now."""
        self.orders = self.orders or Orders.read(self.run)
        token = self.orders.token if self.orders else ""
        found = agents.read_all(self.run)
        self.agents = {node: agent for node, agent in found.items() if agent.token == token}
        now = time.monotonic()
        for node, agent in self.agents.items():
            if node not in self._beats or self._beats[node][0] != agent.beats:
                self._beats[node] = agent.beats, now

    def ended(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended, minus a signal's number, in the order of their end."""
        return {rank: code for agent in self.agents.values() for rank, code in agent.ended}

    def name_of(self, rank: int) -> str:
        assert self.orders
        return self.orders.hosts[self.orders.host_of(rank)][0]

    def lost(self, beats: Sequence[Beat]) -> Loss | None:
        """The first machine that is gone, or that cannot start ranks."""
        if self.orders is None:
            return None
        self._read_exits()
        for node, (name, _) in enumerate(self.orders.hosts):
            agent = self.agents.get(node)
            if agent is not None and agent.exit_code is not None:
                continue
            code = self._exits.get(name)
            if code == agents.NO_FOLDER_CODE:
                shared = "root must be a folder on a file system that all machines share"
                return Loss(f"{name} does not see {self.run.path}; {shared}", UNUSABLE_CODE)
            if code is not None and agent is None:
                why = last_line(self._session(), name) or f"exit code {code}"
                return Loss(f"{name} can start no rank: {why}", UNUSABLE_CODE)
            silent_s = time.monotonic() - self._beats[node][1] if node in self._beats else 0.0
            why = "its connection ended" if code is not None else f"no sign of it for {silent_s:.0f} s"
            if code is not None or silent_s > LOST_AFTER_S:
                return Loss(f"{name} was lost ({why}){self._place(node, beats)}", LOST_CODE, FEWER)
        return None

    def _place(self, node: int, beats: Sequence[Beat]) -> str:
        """Where the machine's ranks were."""
        assert self.orders
        of_machine = [beat for beat in beats if self.orders.host_of(beat.rank) == node]
        return f" with rank {of_machine[0].rank} in {of_machine[0].where()}" if of_machine else ""

    def _read_exits(self) -> None:
        path = self.run.launcher_log
        size = path.stat().st_size if path.exists() else -1
        if size != self._size:
            self._size = size
            found = EXITED.finditer(self._session())
            self._exits = {m["ssh"] or m["node"]: int(m["ssh_code"] or m["code"]) for m in found}

    def _session(self) -> str:
        """The launcher's log from this session's command on."""
        log = b"\n" + self.run.launcher_log.read_bytes()
        return log.rpartition(COMMAND)[2].decode(errors="replace")


def last_line(log: str, name: str) -> str:
    """What a machine said last, as pdsh shows it."""
    said = re.findall(rf"^ ?{re.escape(name)}: (.*\S)", log, re.MULTILINE)
    return said[-1] if said else ""
