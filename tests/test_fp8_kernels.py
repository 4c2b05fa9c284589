"""FP8 as DeepSeek-V3 computes with it: the reference against numbers worked out by hand and in float64, then
the Triton kernels, interpreted, against the reference, and compiled for a Hopper that is not there."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from interpreted import interpreted_kernels
from torch import Tensor

from r1pipe.model.kernels import reference
from r1pipe.model.kernels.reference import FLOOR, Scaled

NAN = float("nan")
SHAPES = [(1, 1), (5, 130), (128, 128), (150, 300)]
SPREADS = [[40, 40, 40, 40], [0, 1, 130, 130, 135], [130], [0, 0]]  # where experts' tokens end
KINDS = {"normal": 1.0, "zeros": 0.0, "huge": 1e30, "tiny": 1e-30, "below the floor": 1e-36}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ends(spread: list[int]) -> Tensor:
    return torch.tensor(spread, dtype=torch.int32)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="Triton is not installed")
    with interpreted_kernels() as module:
        yield module


def test_a_tile_by_hand():
    x = torch.tensor([[896.0, -448, 3, 2.3, 0.001, 0], [1, 0.5, 0, 0, 0, 0]])
    counts = torch.zeros(3, dtype=torch.int64)
    values, scales = reference.quantise_tiles(x, counts=counts)
    assert torch.equal(scales, torch.tensor([[2.0], [1 / 448]])) and counts.tolist() == [2, 1, 0]
    assert values.tolist() == [[448, -224, 1.5, 1.125, 0, 0], [448, 224, 0, 0, 0, 0]]
    values, scales = reference.quantise_blocks(x)
    assert scales.tolist() == [[2.0]] and values[1].tolist() == [0.5, 0.25, 0, 0, 0, 0]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("quantise", [reference.quantise_tiles, reference.quantise_blocks])
def test_rounding_errs_by_half_a_step_at_most(quantise, power_of_two):
    x = normal(3, 200, 300) * normal(3, 200, 300, seed=1).exp()
    scaled = quantise(x, power_of_two)
    rows = 1 if quantise is reference.quantise_tiles else 128
    step = torch.maximum(x.abs() / 8, reference._spread(scaled.scales, x.shape, rows) * 2.0**-9)
    assert ((reference.dequantise(scaled) - x).abs() <= step / 2 * 1.00001).all()


def test_powers_of_two_round_once_however_often_they_are_quantised():
    x = normal(130, 140).sign() * (1 + torch.rand(130, 140, generator=torch.Generator().manual_seed(1)))
    scaled = reference.quantise_tiles(x, power_of_two=True)
    assert (torch.frexp(scaled.scales).mantissa == 0.5).all()
    once = reference.dequantise(scaled)
    twice = reference.dequantise(reference.quantise_tokens(once, ends([130]), power_of_two=True))
    assert torch.equal(twice.T[:130], once)
    assert reference.scale_of(torch.tensor([448.0, 449.0]), power_of_two=True).tolist() == [1, 2]


def test_floor_and_what_is_not_finite():
    x = torch.zeros(4, 256)
    x[1, 0], x[2, 3], x[3, 130] = FLOOR / 2**20, float("inf"), NAN
    counts = torch.zeros(3, dtype=torch.int64)
    values, scales = reference.quantise_tiles(x, counts=counts)
    assert counts.tolist() == [0, 1, 2] and (scales[:2] == FLOOR / 448).all()
    assert scales.isnan().tolist() == [[False, False], [False, False], [True, False], [False, True]]
    assert values.float().isnan().tolist() == scales.repeat_interleave(128, 1).isnan().tolist()


def exactly(a: Scaled, b: Scaled) -> tuple[Tensor, Tensor]:
    """a b^T in float64, and how much its terms come to: what rounding errors are measured by."""
    left, right = reference.dequantise(a).double(), reference.dequantise(b).double()
    return left @ right.T, left.abs() @ right.abs().T


def assert_close(out: Tensor, exact: Tensor, size: Tensor) -> None:
    assert out.dtype == torch.float32 and out.shape == exact.shape and torch.equal(out.isnan(), exact.isnan())
    assert ((out.double() - exact.double()).abs().nan_to_num() <= 1e-5 * size.nan_to_num()).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_dequantised(shape):
    a, weight = reference.quantise_tiles(normal(*shape)), normal(70, shape[1], seed=1)
    for b in (reference.quantise_blocks(weight), reference.quantise_tiles(weight)):
        assert_close(reference.multiply(a, b, torch.float32), *exactly(a, b))


def test_groups_of_tokens_have_places_of_their_own():
    x, spread = normal(131, 5), ends([1, 1, 131])
    assert reference.place_groups(spread).tolist() == [0, 128, 128]
    values, scales = reference.quantise_tokens(x, spread)
    assert values.shape == (5, reference.places_for(131, 3)) == (5, 512) and scales.shape == (5, 4)
    mine, theirs = (reference.quantise_tiles(part.T.contiguous()) for part in (x[:1], x[1:]))
    assert torch.equal(values[:, :1].float(), mine.values.float()) and not values[:, 1:128].float().any()
    assert torch.equal(values[:, 128:258].float(), theirs.values.float())
    assert not values[:, 258:].float().any() and torch.equal(scales[:, 1:3], theirs.scales)


@pytest.mark.parametrize("spread", SPREADS)
def test_experts_multiply_their_own_tokens(spread):
    tokens, spread_E = spread[-1], ends(spread)
    x, d_out = normal(tokens, 130), normal(tokens, 70, seed=1)
    weights = reference.quantise_blocks(normal(len(spread), 70, 130, seed=2))
    a = reference.quantise_tiles(x)
    out = reference.grouped_multiply(a, weights, spread_E, torch.float32)
    outer = reference.grouped_outer(
        *(reference.quantise_tokens(t, spread_E) for t in (d_out, x)), spread_E, torch.float32
    )
    for expert, (first, end) in enumerate(zip([0, *spread], spread, strict=False)):
        weight, part = Scaled(weights.values[expert], weights.scales[expert]), slice(first, end)
        assert_close(out[part], *exactly(Scaled(a.values[part], a.scales[part]), weight))
        one = ends([end - first])
        mine = [reference.quantise_tokens(t[part], one) for t in (d_out, x)]
        assert_close(outer[expert], *exactly(*mine))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_backward_is_what_autograd_finds(weighted):
    kept = reference.quantise_tiles(normal(7, 2 * 150))
    gate_up = reference.dequantise(kept).requires_grad_()
    weights_T = normal(7, seed=1).requires_grad_() if weighted else None
    inner = reference.swiglu(gate_up, weights_T)
    d_inner = normal(7, 150, seed=2)
    inner.backward(d_inner)
    with torch.no_grad():
        again, d_gate_up, d_weights_T = reference.swiglu_backward(kept, weights_T, d_inner)
    torch.testing.assert_close(again, inner.detach())
    torch.testing.assert_close(d_gate_up, gate_up.grad)
    assert (d_weights_T is None) == (weights_T is None)
    if d_weights_T is not None:
        torch.testing.assert_close(d_weights_T, weights_T.grad)


def assert_same(mine: Scaled, theirs: Scaled) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def counters() -> tuple[Tensor, Tensor]:
    return torch.full((3,), 5), torch.full((3,), 5)


def inputs(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    x = normal(*shape) * KINDS.get(kind, 1.0)
    x[..., -1, -1] *= 1e-9
    if kind not in KINDS:
        x[..., 0, -1], x[..., -1, 0] = float("inf"), NAN
    return x.to(dtype)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "not finite"])
def test_triton_quantises_as_the_reference(kernels, kind, power_of_two):
    mine, theirs = counters()
    for shape in [*SHAPES, (2, 1, 3, 130)] if kind == "normal" else [(5, 130)]:
        for dtype in (torch.float32, torch.bfloat16):
            x = inputs(shape, kind, dtype)
            for name in ("quantise_tiles", "quantise_blocks"):
                quantise, wanted = getattr(kernels, name), getattr(reference, name)
                assert_same(quantise(x, power_of_two, mine), wanted(x, power_of_two, theirs))
                assert torch.equal(mine, theirs)
    assert_same(kernels.quantise_tiles(x), reference.quantise_tiles(x))


def test_triton_quantises_ties_views_and_nothing_at_all(kernels):
    (mine, theirs), x = counters(), normal(5, 130)
    ties = torch.tensor([[448.0, 432, 431.9, -432, 416, 2**-10, -(2**-10), 1.001 * 2**-10, 0, 17, 19]])
    assert_same(kernels.quantise_tiles(ties, False, mine), reference.quantise_tiles(ties, False, theirs))
    assert torch.equal(mine, theirs) and (mine - 5).tolist() == [3, 2, 0]
    for view in (x.mT, x[:, 1:7], x[:0], x[:, :0], normal(2, 0, 5)):
        assert_same(kernels.quantise_tiles(view), reference.quantise_tiles(view))
        assert_same(kernels.quantise_blocks(view), reference.quantise_blocks(view))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("spread", SPREADS)
def test_triton_places_tokens_as_the_reference(kernels, spread, power_of_two):
    (mine, theirs), spread_E = counters(), ends(spread)
    for dtype, kind in ((torch.float32, "normal"), (torch.bfloat16, "not finite")):
        x = inputs((spread[-1], 140), kind, dtype) if spread[-1] else normal(0, 140)
        placed = reference.quantise_tokens(x, spread_E, power_of_two, theirs)
        assert_same(kernels.quantise_tokens(x, spread_E, power_of_two, mine), placed)
        assert torch.equal(mine, theirs)
        both = kernels.quantise_both(x, spread_E, power_of_two, mine)
        for a, b in zip(both, reference.quantise_both(x, spread_E, power_of_two, theirs), strict=True):
            assert_same(a, b)
        assert torch.equal(mine, theirs)
        kept = reference.quantise_tiles(x, power_of_two)
        again = reference.requantise_tokens(kept, spread_E, power_of_two)
        assert_same(kernels.requantise_tokens(kept, spread_E, power_of_two), again)


@pytest.mark.parametrize(
    "shape,scale", [*((s, 1.0) for s in SHAPES), *(((5, 130), s) for s in (1e30, 1e-30, NAN))]
)
def test_triton_multiplies_as_the_reference(kernels, shape, scale):
    a, weight = reference.quantise_tiles(normal(*shape)), normal(140, shape[1], seed=1)
    weight[-1] *= scale
    for b in (reference.quantise_blocks(weight), reference.quantise_tiles(weight)):
        out = reference.multiply(a, b, torch.float32)
        assert_close(kernels.multiply(a, b, torch.float32), out, exactly(a, b)[1])
        rounded = kernels.multiply(a, b, torch.bfloat16)
        torch.testing.assert_close(rounded, out.bfloat16(), rtol=2**-7, atol=1e-3, equal_nan=True)


def test_triton_multiplies_alike_whatever_a_program_has(kernels):
    """Each configuration; programs are more than a band of eight rows."""
    products = sys.modules["r1pipe.model.kernels.triton_products"]
    a, weight = reference.quantise_tiles(normal(590, 130)), normal(140, 130, seed=1)
    b = reference.quantise_blocks(weight)
    wanted, size = reference.multiply(a, b, torch.float32), exactly(a, b)[1]
    for config in {(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]): c for c in products.CONFIGS}.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products._multiply, "configs", [config])
            assert_close(kernels.multiply(a, b, torch.float32), wanted, size)


@pytest.mark.parametrize("spread", SPREADS)
def test_triton_groups_as_the_reference(kernels, spread):
    tokens, spread_E = spread[-1], ends(spread)
    x, d_out = normal(tokens, 130), normal(tokens, 70, seed=1)
    a, b = reference.quantise_tiles(x), reference.quantise_blocks(normal(len(spread), 70, 130, seed=2))
    out = reference.grouped_multiply(a, b, spread_E, torch.float32)
    assert_close(kernels.grouped_multiply(a, b, spread_E, torch.float32), out, out.abs() + 10)
    left, right = (reference.quantise_tokens(t, spread_E) for t in (d_out, x))
    outer = reference.grouped_outer(left, right, spread_E, torch.float32)
    assert_close(kernels.grouped_outer(left, right, spread_E, torch.float32), outer, outer.abs() + 10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tokens,inner", [(0, 5), (1, 1), (37, 128), (9, 200)])
def test_triton_swiglu_is_the_reference(kernels, tokens, inner, weighted):
    """Exponentials differ in their last bit: so may scales, and a number on an edge by one code."""
    gate_up = normal(tokens, 2 * inner) * 3
    weights_T = normal(tokens, seed=1) if weighted else None
    (mine, theirs), d_inner = counters(), normal(tokens, inner, seed=2)
    for power_of_two in (False, True):
        a = kernels.swiglu_quantise(gate_up, weights_T, power_of_two, mine)
        b = reference.swiglu_quantise(gate_up, weights_T, power_of_two, theirs)
        torch.testing.assert_close(a.scales, b.scales, rtol=1e-6, atol=0)
        assert ((a.values.view(torch.uint8).int() - b.values.view(torch.uint8).int()).abs() <= 1).all()
    assert (mine - theirs).abs().max() <= 1
    kept = reference.quantise_tiles(gate_up)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = reference.swiglu_backward(kept, weights_T, d_inner.to(dtype))
        for got, want in zip(
            kernels.swiglu_backward(kept, weights_T, d_inner.to(dtype)), wanted, strict=True
        ):
            if want is None:
                assert got is None
            else:
                rtol = 1e-5 if got.dtype == torch.float32 else 2**-7
                torch.testing.assert_close(got, want, rtol=rtol, atol=1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_triton_swiglu_keeps_what_is_not_finite(kernels):
    gate_up = normal(3, 2 * 130)
    gate_up[0, 3], gate_up[1, 200], gate_up[2, 0] = NAN, float("inf"), -1e30
    mine, theirs = counters()
    wanted = reference.swiglu_quantise(gate_up, None, False, theirs)
    got = kernels.swiglu_quantise(gate_up, None, False, mine)
    assert torch.equal(mine, theirs) and torch.equal(got.scales.isnan(), wanted.scales.isnan())
    assert torch.equal(got.values.float().isnan(), wanted.values.float().isnan())


def test_both_backends_have_the_same_names(kernels):
    assert all(hasattr(reference, name) for name in kernels.__all__)


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    """Into FP8 products of tensor cores without spills. A call that waited for the device would fail."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, Path(__file__).parent / "hopper.py"]
    given = {**os.environ, "TRITON_INTERPRET": "0"}
    out = subprocess.run(command, env=given, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [json.loads(line) for line in out.splitlines()]
    products = {"_multiply", "_grouped", "_outer"}
    assert {row["kernel"] for row in rows} == products | {"_quantise", "_place", "_forward", "_backward"}
    for row in rows:
        multiplies = row["kernel"] in products
        spilled = 0 if multiplies else 64  # by `quantise_both`, which has no loop
        assert row["shared"] <= 227 * 1024 and row["stack"] <= spilled, row
        assert row["copies"] == ["0x10"] * multiplies, row  # 16 bytes at once
        assert [name.split(".")[-2:] for name in row["products"]] == [["e4m3", "e4m3"]] * multiplies, row
    tuned = [row for row in rows if row["kernel"] == "_multiply" and row["options"]["BLOCKS"]]
    assert len(tuned) == 7 + 1 + 1 + 7 + 1  # a row less was no other size, a ragged K is
