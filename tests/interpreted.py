"""Triton's kernels on a CPU: its interpreter, switched on in a process that may have imported triton before.

The interpreter's own cast of float32 to E4M3 is no GPU's: it drops half of the numbers below 2^-6 and turns
NaN into 384. Casts are torch's here, which rounds to the nearest, ties to even, as `cvt.rn.e4m3x2` does.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch

KERNELS = "r1pipe.model.kernels.triton_"


def loaded() -> list[str]:
    return [name for name in sys.modules if name.startswith(KERNELS)]


@contextmanager
def interpreted_kernels() -> Iterator[ModuleType]:
    """r1pipe.model.kernels.triton_fp8, interpreted; afterwards all is as it was."""
    import triton.language as tl
    from triton import knobs
    from triton.language import standard
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    convert = interpreter._convert_float

    def convert_as_torch(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding) -> np.ndarray:
        if target == tl.float8e4nv and source == tl.float32:
            return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.float8e4nv and target in (tl.float16, tl.float32):
            codes = torch.from_numpy(data.copy()).view(torch.float8_e4m3fn)
            return codes.to(torch.float16 if target == tl.float16 else torch.float32).numpy()
        return convert(data, source, target, rounding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.runtime, "interpret", True)
        patch.setattr(interpreter, "_convert_float", convert_as_torch)
        for module in (tl, standard):  # sum, max... were compiled functions if triton is not new here
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, interpreter.InterpretedFunction(value.fn))
        for name in loaded():
            patch.delitem(sys.modules, name)
            patch.delattr(name)  # of the package
        yield importlib.import_module(KERNELS + "fp8")
        for name in loaded():
            del sys.modules[name]
            delattr(sys.modules["r1pipe.model.kernels"], name.removeprefix("r1pipe.model.kernels."))
