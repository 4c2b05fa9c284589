"""Which rank this process is, from the variables of the launcher that started it.

| launcher | rank, ranks, rank on its host | where they meet |
|---|---|---|
| DeepSpeed's (local, pdsh), torchrun | RANK, WORLD_SIZE, LOCAL_RANK | MASTER_ADDR, MASTER_PORT |
| Open MPI's mpirun | OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK | ... given with -x |
| MPICH's, Intel's mpirun | PMI_RANK, PMI_SIZE, MPI_LOCALRANKID or PALS_LOCAL_RANKID | ... with -genv |
| srun | SLURM_PROCID, SLURM_STEP_NUM_TASKS or SLURM_NTASKS, SLURM_LOCALID | ... or the first host |

DeepSpeed's openmpi and slurm launchers set none of their own. Launchers nest: mpirun and torchrun may run
inside a Slurm job, whose variables then count its nodes. The nearest one decides; where it is none that
starts several ranks itself, those around it must say the same.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.launchers import MEETING_PORTS

PORTS = range(1, 1 << 16)
HOST = re.compile(r"([^,\[\]]+)(?:\[(\w+)[^\]]*\]([^,\[\]]*))?")  # the first of a Slurm host list


@dataclass(frozen=True)
class Place:
    """A process among those of its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of its host
    master: tuple[str, int] | None = None  # host and port where all meet; None for one rank

    def publish(self) -> None:
        """Set what torch and DeepSpeed read."""
        os.environ.update(
            RANK=f"{self.rank}", WORLD_SIZE=f"{self.world_size}", LOCAL_RANK=f"{self.local_rank}"
        )
        if self.master:
            os.environ.update(MASTER_ADDR=self.master[0], MASTER_PORT=f"{self.master[1]}")


@dataclass(frozen=True)
class Launcher:
    """The names of a launcher's variables; of several names the first that is set counts."""

    name: str
    rank: str
    sizes: tuple[str, ...]
    local_ranks: tuple[str, ...]
    starts_ranks: tuple[str, ...]  # set by one that starts several ranks itself: what is around counts others


# The nearest comes first.
LAUNCHERS = (
    Launcher("torch", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("CROSS_RANK", "GROUP_RANK")),
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_RANK",),
    ),
    Launcher(
        "MPI",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID"),
        ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"),
    ),
    Launcher(
        "srun",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        ("SLURM_LOCALID",),
        (),
    ),
)


def discover(variables: Mapping[str, str] = os.environ) -> Place:
    """This process's place; rank 0 of 1 without a launcher.

    Raises EnvironmentProblem where variables are missing, wrong or contradict one another: two processes that
    both take themselves for rank 0 of 1 would write into one run folder.
    """
    found = [(launcher, _read(launcher, variables)) for launcher in LAUNCHERS if launcher.rank in variables]
    if not found:
        _check_alone(variables)
        return Place()
    (nearest, place), *around = found
    inner = nearest
    for launcher, other in around:
        if any(name in variables for name in inner.starts_ranks):
            break
        if other.world_size > 1 and (other.rank, other.world_size) != (place.rank, place.world_size):
            raise _problem(
                f"{_shown(nearest, variables)} says rank {place.rank} of {place.world_size}, but "
                f"{_shown(launcher, variables)} rank {other.rank} of {other.world_size}; unset the wrong ones"
            )
        inner = launcher
    _check_one_job(variables)
    if place.world_size == 1:
        return place
    return Place(place.rank, place.world_size, place.local_rank, _master(variables))


def _check_alone(variables: Mapping[str, str]) -> None:
    """Raises EnvironmentProblem if there are other ranks though nothing tells this process its own."""
    if "PMIX_RANK" in variables:
        raise _problem("PMIX_RANK is set without a number of ranks; set RANK, WORLD_SIZE and LOCAL_RANK")
    for launcher in LAUNCHERS:
        for name in launcher.sizes:
            if (size := _number(name, variables) if name in variables else 1) > 1:
                raise _problem(
                    f"{name}={size}, but {launcher.rank} is not set, so this process cannot know which of "
                    f"the {size} it is; start it with srun, mpirun or torchrun, or unset {name}"
                )


def _read(launcher: Launcher, variables: Mapping[str, str]) -> Place:
    """What this launcher's variables say."""
    size_name = next((name for name in launcher.sizes if name in variables), None)
    size = None if size_name is None else _number(size_name, variables)
    rank = _number(launcher.rank, variables)
    if size is None and rank > 0:
        raise _problem(f"{launcher.rank}={rank} without {launcher.sizes[0]}, the number of ranks; set it too")
    size = size or 1
    if rank >= size:
        raise _problem(f"{launcher.rank}={rank} is not below {size_name}={size}: ranks count from 0")
    local_name = next((name for name in launcher.local_ranks if name in variables), None)
    if local_name is None and size > 1:
        raise _problem(
            f"{launcher.rank}={rank} of {size} without {launcher.local_ranks[0]}, the rank among those of "
            "this host; set it too"
        )
    local = 0 if local_name is None else _number(local_name, variables)
    if local > rank:
        raise _problem(f"{local_name}={local} is above {launcher.rank}={rank}: a host has no more ranks")
    return Place(rank, size, local)


def _check_one_job(variables: Mapping[str, str]) -> None:
    """Raises EnvironmentProblem where several tasks of srun have each started a launcher that knows nothing
    of the others'. (`r1pipe run` hides srun's variables from its own: each task may run another stage.)"""
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS", "1"))
    nodes = variables.get("CROSS_SIZE", variables.get("GROUP_WORLD_SIZE"))  # DeepSpeed's, torchrun's
    if tasks > 1 and nodes is not None and int(nodes) != tasks:
        raise _problem(
            f"each of the {tasks} tasks of srun has started a launcher, and this one knows of {nodes}; give "
            "srun --ntasks=1, or the launcher the number of nodes"
        )


def _master(variables: Mapping[str, str]) -> tuple[str, int]:
    """Host and port where the ranks meet."""
    address = variables.get("MASTER_ADDR") or first_host(variables.get("SLURM_STEP_NODELIST", ""))
    if not address:
        raise _problem(
            "MASTER_ADDR, the host of rank 0, is not set; start with srun, or give it: "
            "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
        )
    if "MASTER_PORT" in variables:
        port = _number("MASTER_PORT", variables)
    elif "SLURM_STEP_NODELIST" in variables:  # any that all ranks agree on, and no other job of this host has
        job, step = variables.get("SLURM_JOB_ID", "0"), variables.get("SLURM_STEP_ID", "0")
        port = MEETING_PORTS[(int(job) * 97 + int(step)) % len(MEETING_PORTS)]
    else:
        raise _problem(f"MASTER_ADDR={address} without MASTER_PORT; set any free port of that host")
    if port not in PORTS:
        raise _problem(f"MASTER_PORT={port} is no port; give one from 1 to {PORTS[-1]}")
    return address, port


def first_host(hosts: str) -> str:
    """The first of a Slurm host list: gpu[03-05,9],node1 -> gpu03; "" of an empty one."""
    match = HOST.match(hosts)
    return "" if match is None else "".join(part or "" for part in match.groups())


def _number(name: str, variables: Mapping[str, str]) -> int:
    text = variables[name]
    if not (text.isascii() and text.isdigit()):
        raise _problem(f"{name}={text!r} is no whole number")
    return int(text)


def _shown(launcher: Launcher, variables: Mapping[str, str]) -> str:
    return f"{launcher.rank}={variables[launcher.rank]}"


def _problem(text: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"this process's place among its job's ranks is unclear: {text}")
