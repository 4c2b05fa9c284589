"""Facts about this machine for env.json, and checks of what a job needs, before it starts."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import r1pipe
from r1pipe.config import EngineConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.redaction import without_secrets
from r1pipe.runs import hosts

PACKAGES = ("torch", "deepspeed", "datasets", "hydra-core", "mlflow", "safetensors", "tokenizers", "typer")
SOURCES = ("r1pipe", "conf", "stages", "data", "pyproject.toml")  # of a checkout: what a run depends on
FIRST_WITH_E4M3 = (8, 9)  # compute capability of Ada
FP8_PACKAGES = {  # engine.kernels -> module and the package to install
    "triton": ("triton", "triton"),
    "scaled_mm": ("triton", "triton"),
    "deepgemm": ("deep_gemm", "sgl-deep-gemm"),
}


def facts() -> dict[str, Any]:
    """Versions, code and hardware; no environment variables, which may hold secrets.

    `code`: the git revision of this checkout and whether files differ from it; None in an installed wheel.
    """
    revision = _git("rev-parse", "HEAD").strip()
    dirty = bool(_git("status", "--porcelain").strip()) if revision else None
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "code": {"revision": revision or None, "dirty": dirty},
        "machine": {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "cores": cores(),
            "gpus": [name for name, _ in compute_capabilities()],
        },
    }


def devices(engine: EngineConfig) -> dict[str, Any]:
    """The devices of a job on all its machines, for its cost: {"unit": "GPU" or "core", "count": 8}."""
    ranks = hosts.ranks(engine)
    if not on_cpu(engine):
        return {"unit": "GPU", "count": ranks}
    return {"unit": "core", "count": ranks * engine.threads or ranks // engine.ranks * cores()}


def versions() -> dict[str, str | None]:
    """Of the packages that a result depends on; None where one is missing."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def code_diff() -> str:
    """The diff of `SOURCES` to the git revision, new files included, ignored files not; "" without git."""
    with tempfile.TemporaryDirectory() as folder:  # a copy of the index, to which new files are added
        index = Path(folder) / "index"
        original = _git("rev-parse", "--git-path", "index").strip()
        if not original:
            return ""
        with suppress(FileNotFoundError):  # a fresh checkout may have no index
            shutil.copyfile(_checkout() / original, index)
        sources = [name for name in SOURCES if (_checkout() / name).exists()]
        _git("add", "--intent-to-add", "--", *sources, index=index)
        return without_secrets(_git("diff", "HEAD", "--", *sources, index=index))


def _checkout() -> Path:
    return Path(r1pipe.__file__).resolve().parent.parent


def _git(*words: str, index: Path | None = None) -> str:
    """Output of a git command on this checkout; "" in an installed wheel, or without git."""
    home = _checkout()
    if not (home / ".git").exists() or shutil.which("git") is None:
        return ""
    variables = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"} | ({"GIT_INDEX_FILE": str(index)} if index else {})
    line = ["git", "-C", str(home), *words]
    done = subprocess.run(line, capture_output=True, env=variables, check=False)
    return done.stdout.decode(errors="replace")


def cores() -> int:
    """The cores that this process may use; on macOS, which cannot tell, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def search_path() -> str:
    """PATH with this interpreter's folder first, which has the environment's `deepspeed` and `ninja`."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def find_launcher(engine: EngineConfig) -> str:
    """DeepSpeed's launcher. Raises EnvironmentProblem if the job would fail at its start."""
    launcher = shutil.which("deepspeed", path=search_path())
    if launcher is None:
        raise EnvironmentProblem(
            "the command `deepspeed` is missing; `pip install deepspeed` into this environment"
        )
    hosts.check(engine)
    if engine.accelerator == "cuda" and engine.launcher == "local" and not has_gpu():
        raise EnvironmentProblem(
            "engine.accelerator=cuda finds no NVIDIA GPU here; set engine=cpu, or fix the driver"
        )
    if engine.precision == "fp8" and engine.launcher == "local":
        check_fp8_support(engine.kernels, on_cpu(engine))
    compiler = os.environ.get("CXX", "g++")  # DeepSpeed needs one on a CPU at its first start
    if on_cpu(engine) and shutil.which(compiler) is None:
        raise EnvironmentProblem(
            f"the C++ compiler {compiler} is missing, which DeepSpeed needs on a CPU; install it "
            "(Debian: apt install g++) or name another in CXX"
        )
    if on_cpu(engine) and shutil.which("ninja", path=search_path()) is None:
        raise EnvironmentProblem("`ninja` is missing, which DeepSpeed compiles with; `pip install ninja`")
    return launcher


def on_cpu(engine: EngineConfig) -> bool:
    return engine.accelerator == "cpu" or (engine.accelerator == "auto" and not has_gpu())


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def check_fp8_support(kernels: str, cpu: bool) -> None:
    """Raises EnvironmentProblem if engine.precision=fp8 cannot run on any GPU of this machine.

    In the job, model/kernels/choice.py checks again, with torch.
    """
    if kernels == "reference" or (cpu and kernels == "auto"):
        return
    interpreted = kernels == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if cpu and not interpreted:
        raise EnvironmentProblem(
            f"engine.kernels={kernels} needs a GPU; on a CPU engine.kernels=auto emulates (reference)"
        )
    if missing := missing_for("triton" if kernels == "auto" else kernels):
        raise EnvironmentProblem(f"engine.kernels={kernels} cannot run here: {missing}")
    gpus = [] if cpu else compute_capabilities()
    if gpus and max(capability for _, capability in gpus) < FIRST_WITH_E4M3:
        name, capability = gpus[0]
        raise EnvironmentProblem(
            f"engine.precision=fp8 needs a GPU of compute capability 8.9 or newer, but {name} has "
            f"{capability[0]}.{capability[1]}; set engine.precision=bf16"
        )


def missing_for(kernels: str) -> str | None:
    """The message if the package of an FP8 backend is missing."""
    module, package = FP8_PACKAGES[kernels]
    if importlib.util.find_spec(module) is None:
        return f"the package {module} is missing; `pip install {package}`"
    return None


def compute_capabilities() -> list[tuple[str, tuple[int, int]]]:
    """(name, compute capability) of each GPU; [] without a driver, or with one too old to report it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return []
    lines = re.findall(r"^(\d+)\.(\d+), (.*)$", answer.stdout, re.MULTILINE)
    return [(name, (int(major), int(minor))) for major, minor, name in lines]


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))
