"""Compile every Triton kernel of FP8 for Hopper, without one, as calls of real sizes would; print results.

Calls are made with tensors that have no memory. Run in a process of its own: `python tests/hopper.py`.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from r1pipe.model.kernels import triton_fp8 as kernels

TOKENS, WIDTH, INNER, EXPERTS = 4000, 7168, 2048, 256  # of DeepSeek-V3, a ragged number of tokens


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread and bytes of its stack (where spilled ones go), from the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        out = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", out))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"])}


def compiled() -> list[dict[str, Any]]:
    """Of each kernel, with each of its configurations: each is "timed" once, then one is called."""
    rows: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        options = {k: v for k, v in kwargs.items() if isinstance(v, int) and k not in ("BAND", "num_ctas")}
        ptx = kernel.asm["ptx"]
        found = {
            "kernel": self.__name__,
            "options": options,
            "shared": kernel.metadata.shared,
            "products": sorted(set(re.findall(r"wgmma\.mma_async\S+", ptx))),
            "copies": sorted(set(re.findall(r"cp\.async\.c[ag]\S+ \[[^\]]*\], \[[^\]]*\], (0x\w+)", ptx))),
        }
        rows.append(found | resources(kernel))

    def call_once(call: Callable[[], None], quantiles: Any) -> list[float]:
        call()
        return [0.0, 0.0, 0.0]

    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only
    Autotuner.do_bench = property(lambda self: call_once)
    call_all()
    return rows


def call_all() -> None:
    def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    counts, ends_E = matrix(3, dtype=torch.int64), matrix(EXPERTS, dtype=torch.int32)
    x, chances_T = matrix(TOKENS, WIDTH), matrix(TOKENS, dtype=torch.float32)
    for power_of_two, counted in ((False, counts), (True, counts), (True, None)):
        tiles = kernels.quantise_tiles(x, power_of_two, counted)
        for dtype in (torch.float32, torch.bfloat16):
            weights = matrix(EXPERTS, 2 * INNER, WIDTH, dtype=dtype)
            blocks = kernels.quantise_blocks(weights, power_of_two, counted)
        tokens = kernels.quantise_tokens(x, ends_E, power_of_two, counted)
        kernels.quantise_both(x, ends_E, power_of_two, counted)
        kernels.requantise_tokens(tiles, ends_E, power_of_two)
        kernels.swiglu_quantise(matrix(TOKENS, 2 * INNER), chances_T, power_of_two, counted)
    for inner, weights_T in ((INNER, chances_T), (INNER, None), (INNER + 16, None)):
        gate_up = kernels.quantise_tiles(matrix(TOKENS, 2 * inner))
        kernels.swiglu_backward(gate_up, weights_T, matrix(TOKENS, inner))
    weight = kernels.Scaled(blocks.values[0], blocks.scales[0])
    kernels.multiply(tiles, weight, torch.bfloat16)
    kernels.multiply(kernels.quantise_tiles(x[1:]), weight, torch.bfloat16)
    kernels.multiply(tokens, tokens, torch.float32)
    ragged = kernels.quantise_tiles(matrix(TOKENS, 208))
    kernels.multiply(ragged, kernels.quantise_blocks(matrix(INNER, 208)), torch.bfloat16)
    kernels.grouped_multiply(tiles, blocks, ends_E, torch.bfloat16)
    kernels.grouped_outer(tokens, tokens, ends_E, torch.float32)


if __name__ == "__main__":
    for row in compiled():
        print(json.dumps(row))
