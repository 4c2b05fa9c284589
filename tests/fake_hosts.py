"""Stands in for pdsh, mpirun and srun, as DeepSpeed's launchers call them: starts each machine's part here,
with nothing of this process's variables but those that the real one would hand on.

`install` puts them into a folder for PATH, with what DeepSpeed looks for (ompi_info, sinfo) or asks (ssh).
"""

import os
import subprocess
import sys
from pathlib import Path

OWN = ("HOME", "USER")  # what another machine has by itself
CALLED = ("pdsh", "mpirun", "srun", "ssh", "ompi_info", "sinfo")
SLURM_HOSTS = "127.0.0.[1-2]"


def install(folder: Path) -> None:
    folder.mkdir()
    for name in CALLED:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        script.chmod(0o755)


def pdsh(words: list[str]) -> list[subprocess.Popen[bytes]]:
    """-S -f N -w HOST,HOST COMMAND..., which each machine's shell reads; %n is its number."""
    hosts = words[words.index("-w") + 1].split(",")
    command = " ".join(words[words.index("-w") + 2 :])
    bare = {name: os.environ[name] for name in OWN if name in os.environ}
    lines = [["/bin/bash", "-c", command.replace("%n", str(number))] for number in range(len(hosts))]
    return [subprocess.Popen(line, env=bare) for line in lines]


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
    """-n N [ARGUMENTS] --export=ALL[,NAME=VALUE], then the command; two ranks a machine."""
    count = int(words[words.index("-n") + 1])
    [export] = [word for word in words if word.startswith("--export=ALL")]
    shared = dict(os.environ) | dict(pair.split("=", 1) for pair in export.split(",")[1:])
    shared |= {"SLURM_STEP_NODELIST": SLURM_HOSTS, "SLURM_STEP_NUM_TASKS": str(count), "SLURM_JOB_ID": "7"}
    command = words[words.index(export) + 1 :]
    return [
        subprocess.Popen(command, env=shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)})
        for rank in range(count)
    ]


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name in ("pdsh", "mpirun", "srun"):
        sys.exit(max(process.wait() for process in globals()[name](arguments)))
    if name == "ssh":  # hostname -I
        print("127.0.0.1")
