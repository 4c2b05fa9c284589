"""What DeepSpeed's launchers must be told to start ranks on several machines.

As seen in DeepSpeed 0.19.8: `--num_accelerators` replaces the hostfile's slots, and openmpi refuses it; a
hostfile of one machine starts the job here, whatever its name; pdsh and openmpi hand on only variables that
begin with MLFLOW, PYTHON, NCCL, MV2 or UCX; ranks of openmpi and slurm are not told where to meet; and slurm
is made to use ssh.
"""

import os
import random
import re
from collections.abc import Mapping
from pathlib import Path

from r1pipe.config import EngineConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.launchers import MEETING_PORTS
from r1pipe.runs import hosts
from r1pipe.runs.locks import LAUNCH

VARIABLES_FILE = "DS_ENV_FILE"  # DeepSpeed's variable with the path of a file of NAME=VALUE
USERS_FILE = ".deepspeed_env"  # what it reads otherwise, in the home folder and in this one
# What ranks need on other machines as here.
HANDED_ON = (
    *("PATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CXX", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"),
    *("HF_HOME", "HF_HUB_OFFLINE", LAUNCH, "MASTER_ADDR", "MASTER_PORT"),
)
PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)  # DeepSpeed puts quotes around other values


def options(engine: EngineConfig) -> list[str]:
    """The launcher's options for a hostfile."""
    assert engine.hostfile is not None
    port = engine.master_port or random.SystemRandom().choice(MEETING_PORTS)
    found = ["--hostfile", engine.hostfile, "--force_multi", "--launcher", engine.launcher]
    found += ["--master_port", str(port)]
    address = engine.master_addr if engine.launcher == "pdsh" else hosts.master(engine)
    if address is not None:  # else pdsh's asks the first machine, by ssh
        found += ["--master_addr", address]
    if engine.launcher != "pdsh":
        found += ["--no_ssh_check"]
    if engine.ssh_port is not None:
        found += ["--ssh_port", str(engine.ssh_port)]
    if engine.launcher_args:
        found += [f"--launcher_args={engine.launcher_args}"]
    return found


def meeting_place(engine: EngineConfig, line: list[str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of the command `line`, for launchers that do not set them. Under Slurm the
    ranks know the first host themselves: Slurm has its own order."""
    if engine.hostfile is None or engine.launcher == "pdsh":
        return {}
    address = engine.master_addr if engine.launcher == "slurm" else hosts.master(engine)
    port = {"MASTER_PORT": line[line.index("--master_port") + 1]}
    return port if address is None else {"MASTER_ADDR": address, **port}


def write_variables(engine: EngineConfig, variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Write DeepSpeed's file of variables, the user's own last; the variable that names it. Raises
    EnvironmentProblem for a value that the launcher cannot hand on."""
    if engine.hostfile is None:
        return {}
    lines = []
    for name in () if engine.launcher == "slurm" else HANDED_ON:  # srun hands on all
        value = variables.get(name)
        if value is None:
            continue
        if "\n" in value or (engine.launcher == "openmpi" and not PLAIN.fullmatch(value)):
            raise EnvironmentProblem(
                f"engine.launcher={engine.launcher} cannot hand {name}={value!r} on to other machines; "
                "use a path without blanks and quotes"
            )
        lines.append(f"{name}={in_quotes(value)}")
    users = variables.get(VARIABLES_FILE, USERS_FILE)
    for path in dict.fromkeys([Path.home() / users, Path.cwd() / users]):
        if path.is_file():
            lines += [line for line in path.read_text(encoding="utf-8").splitlines() if "=" in line]
    target = folder / "variables"
    target.touch(0o600)
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {VARIABLES_FILE: os.fspath(target)}


def in_quotes(value: str) -> str:
    """As it must stand between the double quotes in which a shell reads it."""
    return re.sub(r'([\\"$`])', r"\\\1", value)
