"""Compiles the C++ of kernels/cpu/, once per machine and source, and loads it with ctypes.

It takes some seconds with g++ or clang++ (or CXX). The library lies in ~/.cache/r1pipe (or R1PIPE_CACHE). Its
name has a hash of all that it depends on, so it is never stale; a rename puts it in place: ranks may race.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent / "cpu"
FLAGS = [
    *("-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math"),
]
NEEDED = {
    torch.float32: "avx512bw",
    torch.bfloat16: "avx512_bf16",
}  # what a type's products take of a processor


def runs_here(dtype: torch.dtype) -> bool:
    """Whether the kernels can compute in `dtype` on this machine."""
    return dtype in NEEDED and NEEDED[dtype] in _processor().split() and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a warning once, where there is no compiler that can make them."""
    path = _place()
    try:
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
        f"the CPU kernels could not be made ({problem}): torch's operators do the work, several times "
        "slower; install g++ 11 or newer or name a compiler in CXX, and see that R1PIPE_CACHE can be written",
        file=sys.stderr,
        flush=True,
    )
    return None


@cache
def _processor() -> str:
    """The first processor's model and features; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    told = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return f"{told.get('model name', '')} {told.get('flags', '')}"


def _compiler() -> str:
    return os.environ.get("CXX") or next((name for name in ("g++", "clang++") if shutil.which(name)), "g++")


def _place() -> Path:
    """The library's path: a hash of sources, flags, compiler, torch and processor is in its name."""
    parts = [torch.__version__, _compiler(), _processor(), *FLAGS]
    parts += [file.read_text(encoding="utf-8") for file in sorted(SOURCES.iterdir()) if file.is_file()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("R1PIPE_CACHE") or Path(home) / "r1pipe") / f"kernels-{name}.so"


def _compile(path: Path) -> None:
    """Raises CalledProcessError with the compiler's words, or OSError."""
    torch_folder, compiler = Path(torch.__file__).parent, _compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [f"{scratch}/{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))]
        include = f"-I{torch_folder}/include"
        commands = [
            [compiler, *FLAGS, include, "-c", str(SOURCES / f"{Path(made).stem}.cpp"), "-o", made]
            for made in objects
        ]
        # linked without -fopenmp: torch has its own OpenMP, and a second would be as many threads again
        libraries = [f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
        commands.append([compiler, "-shared", *objects, "-o", f"{scratch}/all.so", *libraries])
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)
        Path(scratch, "all.so").rename(path)
