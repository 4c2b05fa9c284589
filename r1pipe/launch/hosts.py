"""How ranks are started on several machines: by an agent on each, which pdsh or srun starts, or by mpirun.

DeepSpeed's own pdsh launcher is not used. On a signal it runs `pkill -f` with a pattern that every DeepSpeed
job of the machines matches, and it hands on few variables. Of its openmpi launcher, as seen in 0.19.8:
`--num_accelerators` is refused, and ranks are not told where to meet.
"""

import os
import random
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import r1pipe
from r1pipe.config import EngineConfig, RunConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.launchers import MEETING_PORTS
from r1pipe.core.paths import RunFolder, stages_dir
from r1pipe.runs import hosts
from r1pipe.runs.agents import Orders
from r1pipe.runs.locks import LAUNCH

VARIABLES_FILE = "DS_ENV_FILE"  # DeepSpeed's variable with the path of a file of NAME=VALUE
USERS_FILE = ".deepspeed_env"  # what it reads otherwise, in the home folder and in this one
# What ranks need on other machines as here, and the beginnings of more names.
HANDED_ON = (
    *("PATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CXX", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"),
    *("HF_HOME", "HF_HUB_OFFLINE", LAUNCH, "MASTER_ADDR", "MASTER_PORT"),
)
FAMILIES = ("NCCL_", "UCX_", "MV2_", "PYTHON")
PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)  # DeepSpeed puts quotes around other values
HOST = "{host}"  # in engine.interpreter
FAN_OUT = "1024"  # machines that pdsh reaches at a time
SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
# A machine without power or network is noticed in 30 to 40 s. What the user gives stands before, and counts.
SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"


def port_of(engine: EngineConfig) -> int:
    return engine.master_port or random.SystemRandom().choice(MEETING_PORTS)


def agents_line(engine: EngineConfig, run: RunFolder) -> list[str]:
    """What starts an agent on each machine, once `give_orders` has added the launch's token."""
    python, path, folder = (engine.interpreter or sys.executable, str(run.path), package_folder())
    if engine.launcher == "slurm":
        task = f'exec {python_under_slurm(engine)} -m r1pipe.launch.agent {shlex.quote(path)} "$SLURM_NODEID"'
        start = [
            "srun",
            "--ntasks-per-node=1",
            "--kill-on-bad-exit=1",
            "--cpu-bind=none",
            *shlex.split(engine.launcher_args),
        ]
        return [*start, "sh", "-c", task]

    def quoted(text: str) -> str:
        return shlex.quote(text).replace(
            "%", "%%"
        )  # pdsh replaces %h by the machine's name, %n by its number

    here = "%h".join(map(quoted, python.split(HOST)))
    agent = f"exec env PYTHONPATH={quoted(folder)} {here} -m r1pipe.launch.agent {quoted(path)} %n"
    names = ",".join(hosts.slots_of(engine.hostfile or ""))
    return ["pdsh", "-S", "-R", "ssh", "-f", FAN_OUT, "-w", names, *shlex.split(engine.launcher_args), agent]


def python_under_slurm(engine: EngineConfig) -> str:
    """The interpreter, as a shell of Slurm's reads it on each machine."""
    return '"$SLURMD_NODENAME"'.join(map(shlex.quote, (engine.interpreter or sys.executable).split(HOST)))


def give_orders(
    config: RunConfig, run: RunFolder, line: list[str], token: str, variables: Mapping[str, str]
) -> list[str]:
    """Write what the agents are to do into the run folder; the line that starts those of this launch."""
    orders(config, token, variables).write(run)
    return [*line[:-1], f"{line[-1]} {token}"]


def package_folder() -> str:
    """With this r1pipe: a checkout need not be installed."""
    return str(Path(r1pipe.__file__).resolve().parent.parent)


def orders(config: RunConfig, token: str, variables: Mapping[str, str]) -> Orders:
    """What the agents get. `variables`: of the job on this machine."""
    engine = config.engine
    if engine.launcher == "slurm":
        slots = dict.fromkeys(hosts.of_allocation(), engine.ranks)
        if engine.slurm is not None and engine.slurm.nodes != len(slots):
            raise EnvironmentProblem(
                f"this Slurm job has {' '.join(slots)}, but engine.slurm.nodes={engine.slurm.nodes}; make "
                "them equal, or give the command outside of it to submit another job"
            )
    else:
        slots = hosts.slots_of(engine.hostfile or "")
    kept = {name: variables[name] for name in variables if name in HANDED_ON or name.startswith(FAMILIES)}
    pairs = (line.split("=", 1) for line in users_lines(variables))
    return Orders(
        token=token,
        hosts=list(slots.items()),
        script=str(stages_dir() / config.stage.script),
        folder=os.getcwd(),
        master_addr=engine.master_addr,
        master_port=port_of(engine),
        variables={**kept, **{name.strip(): value.strip().strip("\"'") for name, value in pairs}},
    )


def ssh_variables(engine: EngineConfig, variables: Mapping[str, str]) -> dict[str, str]:
    """How pdsh calls ssh."""
    if engine.launcher != "pdsh":
        return {}
    port = f"-p {engine.ssh_port}" if engine.ssh_port is not None else ""
    return {SSH_ARGUMENTS: f"{variables.get(SSH_ARGUMENTS, '')} {SSH_OPTIONS} {port}".strip()}


def mpi_options(engine: EngineConfig) -> list[str]:
    """The options of DeepSpeed's launcher for mpirun."""
    assert engine.hostfile is not None
    address = hosts.master(engine)
    found = ["--hostfile", engine.hostfile, "--force_multi", "--launcher", engine.launcher, "--no_ssh_check"]
    found += ["--master_port", str(port_of(engine)), *(["--master_addr", address] if address else [])]
    return [*found, f"--launcher_args={engine.launcher_args}"] if engine.launcher_args else found


def meeting_place(engine: EngineConfig, line: list[str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of the command `line`, which mpirun's ranks do not get."""
    if engine.launcher != "openmpi":
        return {}
    address = hosts.master(engine)
    port = {"MASTER_PORT": line[line.index("--master_port") + 1]}
    return port if address is None else {"MASTER_ADDR": address, **port}


def write_variables(engine: EngineConfig, variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Write DeepSpeed's file of variables, the user's own last; the variable that names it. Raises
    EnvironmentProblem for a value that mpirun cannot hand on."""
    if engine.launcher != "openmpi":
        return {}
    lines = []
    for name in HANDED_ON:
        value = variables.get(name)
        if value is None:
            continue
        if not PLAIN.fullmatch(value):
            raise EnvironmentProblem(
                f"engine.launcher={engine.launcher} cannot hand {name}={value!r} on to other machines; "
                "use a path without blanks and quotes"
            )
        lines.append(f"{name}={value}")
    target = folder / "variables"
    target.touch(0o600)
    lines += users_lines(variables)
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {VARIABLES_FILE: os.fspath(target)}


def users_lines(variables: Mapping[str, str]) -> list[str]:
    """NAME=VALUE of the user's own files."""
    users, lines = variables.get(VARIABLES_FILE, USERS_FILE), []
    for path in dict.fromkeys([Path.home() / users, Path.cwd() / users]):
        if path.is_file():
            lines += [line for line in path.read_text(encoding="utf-8").splitlines() if "=" in line]
    return lines
