"""Stands in for pdsh, mpirun and srun, as DeepSpeed's launchers call them: starts each machine's part here,
with nothing of this process's variables but those that the real one would hand on.

`install` puts them into a folder for PATH, with what DeepSpeed looks for (ompi_info, sinfo) or asks (ssh).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

OWN = ("HOME", "USER")  # what another machine has by itself
CALLED = ("pdsh", "mpirun", "srun", "sbatch", "scontrol", "ssh", "ompi_info")
SLURM_HOSTS = "127.0.0.[1-2]"


def install(folder: Path) -> None:
    folder.mkdir()
    for name in CALLED:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        script.chmod(0o755)


def pdsh(words: list[str]) -> list[subprocess.Popen[bytes]]:
    """-S -R ssh -f N -w HOST,HOST COMMAND..., which each machine's shell reads; %n is its number."""
    hosts = words[words.index("-w") + 1].split(",")
    command = " ".join(words[words.index("-w") + 2 :])
    bare = {name: os.environ[name] for name in OWN if name in os.environ}
    lines = [
        ["/bin/bash", "-c", replaced(command, {"n": str(number), "h": name, "%": "%"})]
        for number, name in enumerate(hosts)
    ]
    return [subprocess.Popen(line, env=bare) for line in lines]


def replaced(command: str, values: dict[str, str]) -> str:
    return re.sub("%([nh%])", lambda match: values[match[1]], command)


def mpirun(words: list[str]) -> list[subprocess.Popen[bytes]]:
    """-n N -hostfile FILE, --mca KEY VALUE, -x NAME=VALUE, then the command; two ranks a machine."""
    count, variables = 0, {name: os.environ[name] for name in OWN if name in os.environ}
    while words[0].startswith("-"):
        if words[0] == "-n":
            count = int(words[1])
        if words[0] == "-x":
            name, _, value = words[1].partition("=")
            variables[name] = value
        words = words[3 if words[0] == "--mca" else 2 :]
    return [
        subprocess.Popen(
            words,
            env=variables
            | {
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_SIZE": str(count),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % 2),
            },
        )
        for rank in range(count)
    ]


def srun(words: list[str]) -> list[subprocess.Popen[bytes]]:
    """[OPTIONS] sh -c COMMAND, once on each machine of the job."""
    names = scontrol()
    shared = dict(os.environ) | {"SLURM_STEP_NODELIST": SLURM_HOSTS, "SLURM_STEP_NUM_TASKS": str(len(names))}
    return [
        subprocess.Popen(
            words[words.index("sh") :],
            env=shared
            | {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "SLURM_LOCALID": "0"}
            | {"SLURMD_NODENAME": name},
        )
        for number, name in enumerate(names)
    ]


def scontrol() -> list[str]:
    """show hostnames HOSTS"""
    return ["127.0.0.1", "127.0.0.2"]


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name in ("pdsh", "mpirun", "srun"):
        sys.exit(max(process.wait() for process in globals()[name](arguments)))
    if name == "scontrol":
        print(*scontrol(), sep="\n")
    if name == "ssh":  # hostname -I
        print("127.0.0.1")
