"""Which backend multiplies in FP8 (engine.kernels): one that runs here, or a line that says why not.

Nothing here turns FP8 on: engine.precision=fp8 does, and no recipe does so by itself, because FP8 that is
slower than BF16 must not be a default. On a CPU products are emulated: the same numbers, slowly.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.runs.machine import FIRST_WITH_E4M3, FP8_PACKAGES, missing_for

HOPPER = 9  # major compute capability
CUBLAS_WITH_TILES = (12, 9)  # CUDA of the first cuBLAS with scales of 1 x 128 and 128 x 128


class Backend(NamedTuple):
    """A module with the functions of r1pipe/model/kernels/reference.py."""

    module: str
    why_not: Callable[[torch.device], str | None]  # why `device` cannot run it, or None


def choose(name: str, device: torch.device) -> Any:
    """The backend that engine.kernels=`name` means on `device`.

    Raises EnvironmentProblem with the reason and the remedy where it cannot run there.
    """
    chosen = automatic(device) if name == "auto" else name
    if chosen is None:
        reason = BACKENDS["triton"].why_not(device)
        raise EnvironmentProblem(f"engine.kernels=auto finds none that runs here: {reason}; {_remedy(None)}")
    reason = BACKENDS[chosen].why_not(device)
    if reason is not None:
        raise EnvironmentProblem(
            f"engine.kernels={chosen} cannot run here: {reason}; {_remedy(automatic(device))}"
        )
    return importlib.import_module(f"r1pipe.model.kernels.{BACKENDS[chosen].module}")


def automatic(device: torch.device) -> str | None:
    """What engine.kernels=auto is on `device`; None on a GPU that would have to emulate."""
    if device.type == "cpu":
        return "reference"
    runs = available(device)
    return runs[0] if runs[0] != "reference" else None


def available(device: torch.device) -> list[str]:
    """All backends that run on `device`, in the order in which auto prefers them."""
    return [name for name, backend in BACKENDS.items() if backend.why_not(device) is None]


def _remedy(instead: str | None) -> str:
    if instead is None:
        return "set engine.precision=bf16, or engine.kernels=reference to emulate FP8, slowly"
    return f"engine.kernels=auto takes {instead}"


def _everywhere(device: torch.device) -> str | None:
    return None


def _triton(device: torch.device) -> str | None:
    if missing := missing_for("triton"):
        return missing
    if device.type == "cpu":
        from triton import knobs

        return None if knobs.runtime.interpret else "a CPU runs it in Triton's interpreter alone"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_WITH_E4M3:
        return f"FP8 needs compute capability {_dotted(FIRST_WITH_E4M3)}, {_described(device)}"
    return None


def _scaled_mm(device: torch.device) -> str | None:
    """What torch asks for in `_check_deepseek_support` (aten/src/ATen/native/cuda/ScaledBlas.cpp)."""
    if reason := _on_hopper(device, "cuBLAS scales tiles and blocks"):
        return reason
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    if cuda < CUBLAS_WITH_TILES:
        return f"it needs torch for CUDA {_dotted(CUBLAS_WITH_TILES)} or newer, not {torch.version.cuda}"
    return None


def _deepgemm(device: torch.device) -> str | None:
    """For Hopper alone: on Blackwell DeepGEMM cuts float32 scales down to powers of two."""
    if reason := missing_for("deepgemm") or _on_hopper(device, "its kernels take float32 scales"):
        return reason
    try:  # it looks for CUDA's compiler, and its library is built for one version of torch
        importlib.import_module(FP8_PACKAGES["deepgemm"][0])
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        told = str(error).partition("\n")[0] or "no CUDA toolkit found; set CUDA_HOME"
        return f"deep_gemm does not start ({told})"
    return None


def _on_hopper(device: torch.device, what: str) -> str | None:
    """Why a backend that is Triton's but for some products, which are Hopper's, cannot run."""
    if device.type == "cpu":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return f"{what} on compute capability 9.x alone, {_described(device)}"
    return _triton(device)


def _described(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} has {_dotted(capability)}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# In the order in which auto prefers them. It is what others measured; `make bench-gpu` measures here.
BACKENDS = {
    "deepgemm": Backend("deepgemm", _deepgemm),
    "scaled_mm": Backend("scaled_mm", _scaled_mm),
    "triton": Backend("triton_fp8", _triton),
    "reference": Backend("reference", _everywhere),
}
