"""FP8 in the bench: products and a training step beside BF16's, their tables, and what they are judged by."""

import dataclasses

import pytest
import torch
from bench import ours, products
from bench.__main__ import main
from bench.config import Case, FP8Step, Setting, load_bench, load_products, of_model, rehearsal
from bench.products import Cost, Measured, Product, ProductsBench, costs_table, judgement, products_table
from bench.tables import fp8_table
from rich.console import Console
from test_bench import MIB, result

from r1pipe.core.errors import ConfigError

LARGE = Product(0, 4096, 7168, 16384)
TRAIN = Case("train", ["laptop"], 4, 1, 8, 0, [], {"bf16": 1.0}, {"bf16": 1.25})
STEP = FP8Step(TRAIN, 20, 0.0025)


def shown(*renderables) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        for renderable in renderables:
            console.print(renderable)
    return captured.get()


def cells(table, heading: str) -> list[str]:
    return next(list(column.cells) for column in table.columns if column.header == heading)


def test_products_alone_from_end_to_end(capsys):
    assert main(["products", "--rehearse", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "8, 128 x 256: reference" in said and "2 x 24, 128 x 256" in said
    assert "quantising 32 x 256" in said and said.endswith("done\n")


def test_products_need_the_device_that_they_are_told(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["products"]) == 2
    assert capsys.readouterr().err.startswith("bench: needs a CUDA GPU")


def test_all_products_are_deepseeks_shapes_and_fit_every_backend():
    found = list(products.products(load_products()))
    assert len(found) == 16 and str(found[-1]) == "8 x 4096, 7168 x 2048"
    assert all(product.depth % 128 == 0 and product.columns % 64 == 0 for product in found)


@pytest.mark.parametrize("product", [Product(0, 5, 40, 256), Product(2, 6, 40, 256)])
def test_errors_are_of_e4m3_and_of_bfloat16(product, monkeypatch):
    config = dataclasses.replace(load_products(), device="cpu")
    monkeypatch.setattr(products, "CPU_REPEATS", 1)
    bf16, reference = ProductsBench(config, Console(quiet=True)).product(product)
    assert (bf16.backend, bf16.own_error, reference.backend) == ("bf16", None, "reference")
    assert 1e-4 < bf16.error < 4e-3 and 1e-4 < reference.own_error < 4e-3
    assert 1e-2 < reference.error < 6e-2


def test_a_backend_that_fails_at_one_product_is_passed_over(monkeypatch):
    bench = ProductsBench(dataclasses.replace(load_products(), device="cpu"), Console(width=100))
    work = bench.work

    def broken(product, backend, operands):
        def fail():
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

        return fail if backend == "reference" else work(product, backend, operands)

    monkeypatch.setattr(bench, "work", broken)
    with bench.console.capture() as captured:
        assert [found.backend for found in bench.product(Product(0, 4, 16, 128))] == ["bf16"]
    assert "reference: CUBLAS_STATUS_NOT_SUPPORTED; left out" in captured.get()


@pytest.mark.parametrize(
    "backend, ratio, flops, said",
    [
        ("triton", 0.9, 1e12, "triton: floor 1 MISSED"),
        ("scaled_mm", 1.31, 799e12, "chosen: floor 1.3 reached"),
        ("scaled_mm", 1.6, 801e12, "chosen: floor 1.3 reached, goal 800 TFLOPS reached"),
        ("deepgemm", 1.6, 801e12, ""),
    ],
)
def test_products_are_judged_by_their_backends_floor(backend, ratio, flops, said):
    measured = Measured(LARGE, backend, LARGE.flops / flops, 0.04, 0.002)
    assert judgement(measured, load_products(), ratio, "scaled_mm") == said
    few = dataclasses.replace(measured, product=dataclasses.replace(LARGE, rows=128))
    assert judgement(few, load_products(), ratio, "scaled_mm") == ""


def test_each_product_is_beside_bf16s_and_a_share_of_its_own_peak():
    times = {"bf16": 2e-3, "triton": 1e-3}
    measured = [Measured(LARGE, name, seconds, 0.04, None) for name, seconds in times.items()]
    peaks = {"bf16": LARGE.flops / 1e-3, "fp8": LARGE.flops / 0.5e-3}
    table = products_table(measured, load_products(), peaks, "triton")
    assert cells(table, "of peak") == ["50.0%", "50.0%"]
    assert cells(table, "faster than BF16 by") == ["", "2.00"]
    assert cells(table, "judged")[0] == "" and "chosen: floor 1.3 reached" in cells(table, "judged")[1]


def test_quantising_is_as_fast_as_a_copy_at_best():
    table = costs_table([Cost("copy", 1.0, 4 * 10**9), Cost("tiles", 1.0, 3 * 10**9)], load_products())
    assert cells(table, "GB/s") == ["4", "3"] and cells(table, "of a copy's") == ["100%", "75%"]


def fp8_results(seconds: float, loss: float):
    bf16 = dataclasses.replace(result("ours", 1.0, setting=Setting("bf16", {})), facts={"loss": 2.0})
    facts = {"loss": loss, "shares": {"GEMMs": 0.5, "other": 0.5}}
    return bf16, dataclasses.replace(result("ours_fp8", seconds, 2 * MIB, Setting("fp8", {})), facts=facts)


@pytest.mark.parametrize(
    "seconds, loss, said",
    [
        (0.79, 2.004, "goal 1.25 reached, loss within 0.25%"),
        (0.99, 1.996, "floor 1 reached, loss within 0.25%"),
        (1.01, 2.006, "floor 1 MISSED, LOSS MORE THAN 0.25% APART"),
    ],
)
def test_a_step_in_fp8_is_judged_by_speed_and_loss(seconds, loss, said):
    table, line = fp8_table(STEP, *fp8_results(seconds, loss))
    assert cells(table, "judged") == ["", said]
    assert cells(table, "FP8 is faster by") == ["", f"{1 / seconds:.2f}"]
    assert "GEMMs 50%" in shown(line) and "21 steps each" in table.title


def test_kernels_are_of_four_kinds():
    known = {"_multiply": "GEMMs", "_quantise": "quantisation"}
    kinds = {
        "_multiply": "GEMMs",
        "_quantise": "quantisation",
        "flash_fwd_kernel_cutlass": "attention",
        "triton_tem_fused_flex_attention_0": "attention",
        "nvjet_sm90_tst_256x128_64x4": "GEMMs",
        "aten::_scaled_mm": "GEMMs",
        "aten::mm": "GEMMs",
        "aten::addmm": "GEMMs",
        "aten::_grouped_mm": "GEMMs",
        "aten::copy_": "other",
    }
    assert {name: ours.kind_of(name, known) for name in kinds} == kinds


def test_shares_of_a_products_time_add_up():
    a = torch.randn(300, 300)
    found = ours.shares(lambda: (a @ a).exp(), cuda=False)
    assert found["GEMMs"] > 0 and found["attention"] == 0
    assert sum(found.values()) == pytest.approx(1)


def test_fp8_is_a_setting_of_ours_fp8_alone(monkeypatch):
    from bench import config

    content = config.read("bench/gpu")
    settings = {"ours/train": [{"dtype": "fp8", "options": {}}]}
    monkeypatch.setattr(config, "read", lambda name: {**content, "settings": settings})
    with pytest.raises(ConfigError, match="ours/train: fp8 is no setting"):
        load_bench("gpu")


def test_the_fp8_step_is_as_large_as_the_case_that_found_its_bf16_setting():
    config = load_bench("gpu")
    assert config.fp8 is not None
    train = next(case for case in config.cases if case.kind == "train")
    assert dataclasses.replace(config.fp8.case, peers=train.peers, floors={}, goals={}) == train
    small = rehearsal(of_model(config, "laptop")).fp8
    assert small is not None and (small.case.models, small.case.prompt, small.steps) == (["laptop"], 8, 1)
