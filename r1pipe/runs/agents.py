"""The hosts of a job, in its run folder: what they are to start, and what each of them shows.

The command writes log/launch.json. On each host an agent (r1pipe.launch.agent) starts the ranks and shows in
log/agent-N.json, where N counts hosts from 0, that it is alive and how its ranks ended.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.files import read_object, write_text

RECORD_BYTES = 4096  # fixed length: the file is overwritten in place, as heartbeats are
TRIES, TRY_AGAIN_S = 5, 0.001  # a read may meet a write
NO_FOLDER_CODE = 66  # exit code of an agent that does not see the run folder (sysexits.h: no input)


@dataclass
class Orders:
    """What every host of a launch gets."""

    token: str  # of the launch (runs.locks)
    hosts: list[tuple[str, int]]  # name and ranks of each, in the order of ranks
    script: str
    folder: str  # where the command was given
    master_addr: str | None  # None: the first host says
    master_port: int
    variables: Mapping[str, str]

    def write(self, run: RunFolder) -> None:
        for stale in run.log.glob(f"{RunFolder.AGENT}*.json"):
            stale.unlink()
        run.orders.touch(0o600)
        write_text(run.orders, json.dumps(asdict(self)))
        run.orders.chmod(0o600)  # variables may be private

    @classmethod
    def read(cls, run: RunFolder) -> "Orders | None":
        """None where they are not to be seen."""
        try:
            orders = cls(**read_object(run.orders))
        except (CheckpointError, TypeError):
            return None
        orders.hosts = [(name, ranks) for name, ranks in orders.hosts]
        return orders

    def first_rank(self, node: int) -> int:
        return sum(ranks for _, ranks in self.hosts[:node])

    def host_of(self, rank: int) -> int:
        """The number of the host that has this rank."""
        return next(node for node in range(len(self.hosts)) if rank < self.first_rank(node + 1))


@dataclass
class Agent:
    """What one host shows."""

    node: int
    token: str = ""
    address: str = ""  # where other hosts reach it
    beats: int = 0
    ended: list[tuple[int, int]] = field(default_factory=list)  # rank and exit code, minus a signal's number
    exit_code: int | None = None  # once all its ranks have ended

    def show(self, run: RunFolder) -> None:
        """Raises OSError."""
        file = os.open(run.agent(self.node), os.O_CREAT | os.O_WRONLY)
        try:
            os.pwrite(file, json.dumps(asdict(self)).encode().ljust(RECORD_BYTES), 0)
        finally:
            os.close(file)  # on NFS, this shows the content to other hosts


def read(path: Path) -> Agent | None:
    """None if the file is missing or cannot be parsed."""
    for _ in range(TRIES):
        try:
            agent = Agent(**json.loads(path.read_text(encoding="utf-8")))
            agent.ended = [(rank, code) for rank, code in agent.ended]
            return agent
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):  # it is being written
            time.sleep(TRY_AGAIN_S)
    return None


def read_all(run: RunFolder) -> dict[int, Agent]:
    """Those that have begun, by the number of their host."""
    agents = (read(path) for path in run.log.glob(f"{RunFolder.AGENT}*.json"))
    return {agent.node: agent for agent in agents if agent is not None}
