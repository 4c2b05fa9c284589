"""The choice of an FP8 backend, and the vendors' backends with stand-ins that check layouts as documented."""

import importlib
import os
import sys
import types

import pytest
import torch

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.model.kernels import choice, reference
from r1pipe.model.kernels.reference import TILE, Scaled
from r1pipe.runs import machine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def gpu(monkeypatch, capability, name="NVIDIA H200", cuda="13.0", packages=("triton",)):
    """A machine with this GPU, as torch would tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: types.SimpleNamespace() if module in packages else None
    )
    if "deep_gemm" in packages:
        monkeypatch.setitem(sys.modules, "deep_gemm", types.ModuleType("deep_gemm"))


def test_a_cpu_emulates_and_says_what_else_it_cannot():
    assert choice.choose("auto", CPU) is reference
    with pytest.raises(
        EnvironmentProblem, match=r"kernels=scaled_mm cannot run here: it needs a GPU; .*reference"
    ):
        choice.choose("scaled_mm", CPU)
    with pytest.raises(
        EnvironmentProblem, match=r"only in Triton's interpreter; engine.kernels=auto takes reference"
    ):
        choice.choose("triton", CPU)


def test_auto_takes_the_first_that_runs(monkeypatch):
    gpu(monkeypatch, (9, 0), packages=("triton", "deep_gemm"))
    assert choice.available(GPU) == ["deepgemm", "scaled_mm", "triton", "reference"]
    gpu(monkeypatch, (9, 0))
    assert choice.automatic(GPU) == "scaled_mm"
    gpu(monkeypatch, (9, 0), cuda="12.8")
    assert choice.automatic(GPU) == "triton"
    gpu(monkeypatch, (10, 0), packages=("triton", "deep_gemm"))
    assert choice.automatic(GPU) == "triton"


@pytest.mark.parametrize(
    "kernels, capability, cuda, told",
    [
        (
            "scaled_mm",
            (8, 9),
            "13.0",
            "only on compute capability 9.x, NVIDIA L40S has 8.9; .*auto takes triton",
        ),
        ("scaled_mm", (9, 0), "12.8", "CUDA 12.9 or newer, not 12.8; engine.kernels=auto takes triton"),
        (
            "deepgemm",
            (9, 0),
            "13.0",
            "deep_gemm is missing; `pip install sgl-deep-gemm`; .*auto takes scaled_mm",
        ),
        (
            "triton",
            (8, 0),
            "13.0",
            "needs compute capability 8.9, NVIDIA L40S has 8.0; set engine.precision=bf16",
        ),
        ("auto", (8, 0), "13.0", "kernels=auto cannot run here: .* 8.0; set engine.precision=bf16"),
    ],
)
def test_what_a_gpu_cannot_run_is_refused_with_a_remedy(monkeypatch, kernels, capability, cuda, told):
    gpu(monkeypatch, capability, "NVIDIA L40S", cuda)
    with pytest.raises(EnvironmentProblem, match=told) as raised:
        choice.choose(kernels, GPU)
    assert "\n" not in str(raised.value)


def test_any_gpu_may_emulate(monkeypatch):
    gpu(monkeypatch, (8, 0))
    assert choice.choose("reference", GPU) is reference


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A fake nvidia-smi, told what to print."""

    def install(*lines: str) -> None:
        told = "".join(f"echo '{line}'\n" for line in lines)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{told}")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    return install


def test_before_a_job_starts_its_gpu_must_know_e4m3(driver):
    driver("8.0, NVIDIA A100-SXM4-80GB")
    with pytest.raises(EnvironmentProblem, match=r"A100-SXM4-80GB has 8.0; set engine.precision=bf16"):
        machine.check_fp8_support("auto", cpu=False)
    machine.check_fp8_support("reference", cpu=False)
    driver("8.0, NVIDIA A100-SXM4-80GB", "9.0, NVIDIA H200")
    machine.check_fp8_support("auto", cpu=False)
    driver('Field "compute_cap" is not a valid field to query.')
    machine.check_fp8_support("auto", cpu=False)


def test_before_a_job_starts_its_package_must_be_there(driver, monkeypatch):
    driver("9.0, NVIDIA H200")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"kernels=deepgemm .* `pip install sgl-deep-gemm`"):
        machine.check_fp8_support("deepgemm", cpu=False)
    machine.check_fp8_support("auto", cpu=True)
    with pytest.raises(EnvironmentProblem, match="kernels=scaled_mm needs a GPU"):
        machine.check_fp8_support("scaled_mm", cpu=True)


# --- the vendors' backends


def operands(rows: int, columns: int, depth: int, blocks: bool) -> tuple[Scaled, Scaled]:
    torch.manual_seed(0)
    a, b = torch.randn(rows, depth), torch.randn(columns, depth)
    quantise = reference.quantise_blocks if blocks else reference.quantise_tiles
    return reference.quantise_tiles(a), quantise(b)


def scaled_mm_of_torch(a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype):
    """What ScaledBlas.cpp checks before cuBLAS is called, and the product by the reference."""
    recipes = torch.nn.functional.ScalingType
    (rows, depth), columns = a.shape, b.shape[1]
    deep = -(-depth // TILE)
    assert rows % 4 == 0 and depth % 16 == 0 and columns % 16 == 0
    assert a.stride() == (depth, 1) and b.stride() == (1, depth)
    assert recipe_a == recipes.BlockWise1x128
    assert scale_a.shape == (rows, deep) and scale_a.stride() == (1, rows)
    if recipe_b == recipes.BlockWise1x128:
        assert scale_b.shape == (columns, deep) and scale_b.stride() == (1, columns)
        scales_b = scale_b
    else:
        assert recipe_b == recipes.BlockWise128x128
        fours = deep + -deep % 4
        assert scale_b.shape == (fours, -(-columns // TILE)) and scale_b.stride() == (1, fours)
        scales_b = scale_b.T[:, :deep]
    return reference.multiply(Scaled(a, scale_a), Scaled(b.T, scales_b), output_dtype)


@pytest.fixture
def scaled_mm(monkeypatch):
    from r1pipe.model.kernels import scaled_mm

    monkeypatch.setattr(scaled_mm, "triton_fp8", types.SimpleNamespace(quantise_tiles="Triton's"))
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm_of_torch)
    return scaled_mm


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("rows, columns, depth", [(8, 256, 640), (5, 144, 80), (128, 16, 512)])
def test_scaled_mm_gets_scales_as_cublas_reads_them(scaled_mm, rows, columns, depth, blocks):
    a, b = operands(rows, columns, depth, blocks)
    for dtype in (torch.bfloat16, torch.float32):
        out = scaled_mm.multiply(a, b, dtype)
        assert out.dtype == dtype and out.equal(reference.multiply(a, b, dtype))


def test_scaled_mm_copies_no_scales_that_lie_right(scaled_mm):
    scales = torch.rand(3, 8).T
    assert scaled_mm.rows_together(scales) is scales


def test_scaled_mm_leaves_the_rest_to_triton(scaled_mm, monkeypatch):
    assert scaled_mm.quantise_tiles == "Triton's"
    scaled_mm.triton_fp8.multiply = lambda a, b, dtype: "Triton's"
    assert scaled_mm.multiply(*operands(8, 24, 128, True), torch.bfloat16) == "Triton's"


class FakeDeepGemm(types.ModuleType):
    """What csrc/apis/gemm.hpp and csrc/utils/layout.hpp assert on Hopper, and products by the reference."""

    def __init__(self):
        super().__init__("deep_gemm")
        self.calls = []

    def fp8_gemm_nt(self, a, b, d, c=None, recipe=None):
        self.calls.append("fp8_gemm_nt")
        (values_a, scales_a), (values_b, scales_b) = a, b
        (rows, depth), columns = values_a.shape, len(values_b)
        assert values_a.is_contiguous() and values_b.is_contiguous() and d.shape == (rows, columns)
        assert scales_a.shape == (rows, depth // TILE)
        if recipe is None:  # sm90_fp8_gemm_1d2d
            assert c is None and d.dtype == torch.bfloat16 and scales_b.is_contiguous()
            assert scales_b.shape == (-(-columns // TILE), depth // TILE)
        else:  # sm90_fp8_gemm_1d1d
            assert recipe == (1, 1, 128) and c is d and d.dtype == torch.float32
            assert scales_b.shape == (columns, depth // TILE)
        product = reference.multiply(Scaled(*a), Scaled(*b), d.dtype)
        d.copy_(product if c is None else c + product)

    def m_grouped_fp8_gemm_nt_contiguous(self, a, b, d, experts_P):
        self.calls.append("m_grouped_fp8_gemm_nt_contiguous")
        (values_a, scales_a), (values_b, scales_b) = a, b
        (places, depth), (experts, columns, _) = values_a.shape, values_b.shape
        assert places % TILE == 0 and d.shape == (places, columns) and d.dtype == torch.bfloat16
        assert scales_a.shape == (places, depth // TILE) and scales_a.stride() == (1, places)
        assert scales_b.shape == (experts, -(-columns // TILE), depth // TILE) and scales_b.is_contiguous()
        assert experts_P.shape == (places,) and experts_P.dtype == torch.int32
        d.fill_(torch.nan)  # places of nobody are not written
        for first in range(0, places, TILE):
            of = experts_P[first : first + TILE]
            mine = of[of >= 0].unique()
            assert len(mine) <= 1 and bool((of[:1] >= 0) == bool(len(mine)))  # a group asks its first place
            if len(mine):
                rows, e = slice(first, first + TILE), int(mine)
                whole = Scaled(values_a[rows], scales_a[rows]), Scaled(values_b[e], scales_b[e])
                d[rows] = torch.where((of >= 0)[:, None], reference.multiply(*whole, d.dtype), torch.nan)


@pytest.fixture
def deepgemm(monkeypatch):
    fake = FakeDeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", fake)
    monkeypatch.delitem(sys.modules, "r1pipe.model.kernels.deepgemm", raising=False)
    module = importlib.import_module("r1pipe.model.kernels.deepgemm")
    monkeypatch.setattr(module, "triton_fp8", types.SimpleNamespace(grouped_outer="Triton's"))
    yield module, fake
    del sys.modules["r1pipe.model.kernels.deepgemm"]


@pytest.mark.parametrize("blocks", [True, False])
def test_deepgemm_multiplies_blocks_into_bf16_and_tiles_into_fp32(deepgemm, blocks):
    module, fake = deepgemm
    a, b = operands(7, 192, 384, blocks)
    dtype = torch.bfloat16 if blocks else torch.float32
    assert module.multiply(a, b, dtype).equal(reference.multiply(a, b, dtype))
    assert fake.calls == ["fp8_gemm_nt"]


@pytest.mark.parametrize("counts", [[3, 0, 130, 128], [0, 0, 0, 1]])
def test_deepgemm_gets_each_expert_in_groups_of_its_own(deepgemm, counts):
    module, fake = deepgemm
    torch.manual_seed(0)
    ends_E = torch.tensor(counts).cumsum(0).int()
    a = reference.quantise_tiles(torch.randn(sum(counts), 256))
    b = reference.quantise_blocks(torch.randn(len(counts), 192, 256))
    expected = reference.grouped_multiply(a, b, ends_E, torch.bfloat16)
    assert module.grouped_multiply(a, b, ends_E, torch.bfloat16).equal(expected)
    assert fake.calls == ["m_grouped_fp8_gemm_nt_contiguous"]


def test_deepgemm_leaves_the_rest_to_triton(deepgemm):
    module, fake = deepgemm
    assert module.grouped_outer == "Triton's"
    module.triton_fp8.multiply = module.triton_fp8.grouped_multiply = lambda *given: "Triton's"
    assert module.multiply(*operands(8, 64, 200, True), torch.bfloat16) == "Triton's"
    assert module.multiply(*operands(8, 64, 256, True), torch.float32) == "Triton's"
    assert fake.calls == []
