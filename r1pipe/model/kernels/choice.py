"""Chooses the backend that multiplies in FP8 (engine.kernels), or explains why it cannot run here.

engine.precision=fp8 turns FP8 on, and no recipe does by default, because it may be slower than BF16. On a CPU
products are emulated: the same numbers, slowly.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.runs.machine import FIRST_WITH_E4M3, FP8_PACKAGES, missing_for

MODULES = {"triton": "triton_fp8"}  # where a backend's module has another name
HOPPER = 9  # major compute capability
CUBLAS_WITH_TILES = (12, 9)  # CUDA of the first cuBLAS with scales of 1 x 128 and 128 x 128


def choose(name: str, device: torch.device) -> Any:
    """The backend that engine.kernels=`name` means on `device`.

    Raises EnvironmentProblem with the reason and the remedy where it cannot run there.
    """
    chosen = (automatic(device) or "triton") if name == "auto" else name
    if reason := BACKENDS[chosen](device):
        remedy = "set engine.precision=bf16, or engine.kernels=reference to emulate FP8, slowly"
        if best := automatic(device):
            remedy = f"engine.kernels=auto takes {best}"
        raise EnvironmentProblem(f"engine.kernels={name} cannot run here: {reason}; {remedy}")
    return importlib.import_module(f"r1pipe.model.kernels.{MODULES.get(chosen, chosen)}")


def automatic(device: torch.device) -> str | None:
    """The backend of engine.kernels=auto on `device`; None on a GPU that would have to emulate."""
    if device.type == "cpu":
        return "reference"
    best = available(device)[0]
    return None if best == "reference" else best


def available(device: torch.device) -> list[str]:
    """All backends that run on `device`, in the order in which auto prefers them."""
    return [name for name, why_not in BACKENDS.items() if why_not(device) is None]


def _triton(device: torch.device) -> str | None:
    if missing := missing_for("triton"):
        return missing
    if device.type == "cpu":
        from triton import knobs

        return None if knobs.runtime.interpret else "a CPU runs it only in Triton's interpreter"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_WITH_E4M3:
        return f"FP8 needs compute capability {_dotted(FIRST_WITH_E4M3)}, {_described(device)}"
    return None


def _scaled_mm(device: torch.device) -> str | None:
    """The requirements of `_check_deepseek_support` in torch's aten/src/ATen/native/cuda/ScaledBlas.cpp."""
    if reason := _on_hopper(device, "cuBLAS scales tiles and blocks"):
        return reason
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    if cuda < CUBLAS_WITH_TILES:
        return f"it needs torch for CUDA {_dotted(CUBLAS_WITH_TILES)} or newer, not {torch.version.cuda}"
    return None


def _deepgemm(device: torch.device) -> str | None:
    """Only for Hopper: on Blackwell DeepGEMM rounds float32 scales down to powers of two."""
    if reason := missing_for("deepgemm") or _on_hopper(device, "its kernels take float32 scales"):
        return reason
    try:  # it looks for CUDA's compiler, and its library is built for one version of torch
        importlib.import_module(FP8_PACKAGES["deepgemm"][0])
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        problem = str(error).partition("\n")[0] or "no CUDA toolkit found; set CUDA_HOME"
        return f"deep_gemm does not start ({problem})"
    return None


def _on_hopper(device: torch.device, feature: str) -> str | None:
    """Why a backend cannot run that needs Hopper for some products and Triton for the others."""
    if device.type == "cpu":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return f"{feature} only on compute capability 9.x, {_described(device)}"
    return _triton(device)


def _described(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} has {_dotted(capability)}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# Each backend, a module with the functions of reference.py, with why a device cannot run it (or None), in the
# order in which auto prefers them, from published measurements; `make bench-gpu` measures here.
BACKENDS: dict[str, Callable[[torch.device], str | None]] = {
    "deepgemm": _deepgemm,
    "scaled_mm": _scaled_mm,
    "triton": _triton,
    "reference": lambda device: None,
}
