"""Compiles the C++ of kernels/cpu/, once per machine and source, and loads it with ctypes.

It takes some seconds with g++ 11 or newer (or the compiler in CXX). The library is in ~/.cache/r1pipe (or
R1PIPE_CACHE). A hash of sources, flags, torch and processor in its name means that it is never stale, and an
atomic rename that it is never incomplete.
"""

import ctypes
import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from r1pipe.runs import heartbeat

SOURCES = Path(__file__).resolve().parent / "cpu"
FLAGS = [
    *("-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math"),
]
# Features of the processor, any of these sets; see cpu/simd.h.
NEEDED = {torch.float32: ["avx512bw", "avx2 fma"], torch.bfloat16: ["avx512_bf16"]}


@cache
def runs_here(dtype: torch.dtype) -> bool:
    """Whether the kernels can compute in `dtype` on this machine."""
    here = set(_processor().split())
    if not any(here.issuperset(features.split()) for features in NEEDED.get(dtype, [])):
        return False
    kernels = library()
    return kernels is not None and bool(kernels.r1pipe_multiplies(ctypes.c_int64(dtype == torch.bfloat16)))


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one warning, if they cannot be compiled."""
    path = _place()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one rank compiles, and the others wait
            if not path.exists():
                print("compiling the CPU kernels (once for this machine)", file=sys.stderr, flush=True)
                _compile(path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
        problem = lines[0]
    except OSError as error:  # no compiler, or nowhere to write
        problem = str(error)
    print(
        f"the CPU kernels could not be compiled ({problem}): torch's operators are used, several times "
        "slower; install g++ 11 or newer or set CXX to a compiler, and make R1PIPE_CACHE writable",
        file=sys.stderr,
        flush=True,
    )
    return None


def call(name: str, *arguments: Any) -> None:
    """Call r1pipe_`name`: tensors become pointers, None a null pointer; the caller must have checked them.

    Raises ValueError if the kernels do not run.
    """
    kernels = library()
    if kernels is None:
        raise ValueError(f"the CPU kernel {name} cannot be called: the kernels do not run on this machine")
    converted = list(arguments)
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            converted[i] = ctypes.c_void_p(argument.data_ptr())
        elif isinstance(argument, float):
            converted[i] = ctypes.c_float(argument)
        elif argument is None or isinstance(argument, int):
            converted[i] = ctypes.c_int64(argument or 0)
    getattr(kernels, f"r1pipe_{name}")(*converted)


@cache
def _processor() -> str:
    """The first processor's model and features; empty where the system does not list them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    by_key = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return f"{by_key.get('model name', '')} {by_key.get('flags', '')}"


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _place() -> Path:
    """The library's path, with a hash of its inputs in the name."""
    parts = [torch.__version__, _compiler(), _processor(), *FLAGS]
    parts += [file.read_text(encoding="utf-8") for file in sorted(SOURCES.iterdir()) if file.is_file()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("R1PIPE_CACHE") or Path(home) / "r1pipe") / f"kernels-{name}.so"


def _compile(path: Path) -> None:
    """Raises CalledProcessError with the compiler's output, or OSError."""
    torch_folder, compiler = Path(torch.__file__).parent, shlex.split(_compiler())
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = {source: f"{scratch}/{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
        include = f"-I{torch_folder}/include"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [[*compiler, *FLAGS, include, "-c", str(s), "-o", o] for s, o in objects.items()]
            list(pool.map(_run, commands))
        # linked without -fopenmp: torch has its own OpenMP, and a second would double the threads
        libraries = ["-pthread", f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
        _run([*compiler, "-shared", *objects.values(), "-o", f"{scratch}/all.so", *libraries])
        Path(scratch, "all.so").rename(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
    heartbeat.tick()
