"""The machines of a job: DeepSpeed's hostfile, one line per machine: NAME slots=8."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from r1pipe.config import EngineConfig
from r1pipe.core.errors import EnvironmentProblem

LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s.*)?")
COMMANDS = {"pdsh": "pdsh", "openmpi": "mpirun", "slurm": "sbatch"}  # engine.launcher -> what it starts
PACKAGES = {"pdsh": "pdsh", "openmpi": "openmpi-bin", "slurm": "slurm-client"}  # of Debian


def slots_of(hostfile: str) -> dict[str, int]:
    """Name -> ranks of each machine, in the order of ranks. Raises EnvironmentProblem naming the line."""
    try:
        lines = Path(hostfile).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise EnvironmentProblem(
            f"engine.hostfile={hostfile} {problem}; write one line per machine: NAME slots=8"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None or not int(match[2]):
            raise EnvironmentProblem(f"{hostfile}:{number}: {line!r} is not of the form NAME slots=8")
        if match[1] in slots:
            raise EnvironmentProblem(f"{hostfile}:{number}: {match[1]} is there twice; give its slots once")
        slots[match[1]] = int(match[2])
    if not slots:
        raise EnvironmentProblem(f"engine.hostfile={hostfile} names no machine; write NAME slots=8")
    return slots


def check(engine: EngineConfig) -> None:
    """Raises EnvironmentProblem if the job cannot start on the machines of its hostfile."""
    slots_by_name = {} if engine.hostfile is None else slots_of(engine.hostfile)
    for name, slots in slots_by_name.items():
        if slots != engine.ranks:
            raise EnvironmentProblem(
                f"{engine.hostfile} gives {name} slots={slots}, but threads and memory are reckoned for "
                f"engine.ranks={engine.ranks} on each machine; make them equal"
            )
    if engine.launcher != "local" and shutil.which(COMMANDS[engine.launcher]) is None:
        raise EnvironmentProblem(
            f"engine.launcher={engine.launcher} needs the command {COMMANDS[engine.launcher]}; install it "
            f"(Debian: apt install {PACKAGES[engine.launcher]}), or choose another launcher"
        )


def ranks(engine: EngineConfig) -> int:
    """Of all machines; where the hostfile is still missing, of one."""
    if engine.slurm is not None:
        return engine.slurm.nodes * engine.ranks
    if engine.hostfile is None or not Path(engine.hostfile).is_file():
        return engine.ranks
    return sum(slots_of(engine.hostfile).values())


def master(engine: EngineConfig) -> str | None:
    """Where the ranks meet, as far as it is known: on the first machine, unless a key says another."""
    if engine.master_addr is None and engine.hostfile is not None and Path(engine.hostfile).is_file():
        return next(iter(slots_of(engine.hostfile)))
    return engine.master_addr


def of_allocation() -> list[str]:
    """The machines of the Slurm job that this process is in. Raises EnvironmentProblem outside of one."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise EnvironmentProblem("this process is in no Slurm job: SLURM_JOB_NODELIST is not set")
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EnvironmentProblem(f"scontrol show hostnames {nodes}: {done.stderr.strip()}")
    return done.stdout.split()
