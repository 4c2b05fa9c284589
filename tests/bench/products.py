"""Products of FP8 matrices on every backend that runs here, beside BF16's, and what quantising costs.

Axes: M, N, K of a product [M, K] x [N, K]; E experts, whose rows are M in all.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import ScalingType

from bench.config import ProductsConfig, gpu_name, load_products, small_products
from bench.tables import new_table, reached, speedup
from r1pipe.model.kernels import choice
from r1pipe.model.kernels.reference import FP8, Scaled, dequantise

BF16 = "bf16"  # as a backend: cuBLAS through torch, and torch's grouped product
CPU_REPEATS = 3
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Product:
    """A product, or one for each of `experts` (0: it is not grouped)."""

    experts: int
    rows: int  # M, of all experts
    columns: int  # N
    depth: int  # K

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.depth

    def __str__(self) -> str:
        rows = f"{self.experts} x {self.rows // self.experts}" if self.experts else str(self.rows)
        return f"{rows}, {self.columns} x {self.depth}"


@dataclass(frozen=True)
class Measured:
    """One backend's product."""

    product: Product
    backend: str
    seconds: float
    error: float  # of the product: how far from float64's, see `apart`
    own_error: float | None  # the same against float64 from the operands in FP8


@dataclass(frozen=True)
class Cost:
    """One way to quantise."""

    name: str
    seconds: float
    bytes: int  # read and written, at least


class Operands(NamedTuple):
    """x [M, K] and weight [N, K] or [E, N, K] in bfloat16, both in FP8, and where experts' rows end, [E]."""

    x: Tensor
    weight: Tensor
    x_fp8: Scaled
    weight_fp8: Scaled
    ends_E: Tensor


def main(device: str | None, rehearse: bool, console: Console) -> None:
    """Measure everything and print two tables. Raises EnvironmentProblem where nothing can be measured."""
    config = load_products()
    config = replace(small_products(config) if rehearse else config, device=device or config.device)
    if config.device == "cuda":
        gpu_name()
    torch.set_num_threads(config.threads)
    bench = ProductsBench(config, console)
    peaks = bench.peaks()
    measured = [result for product in products(config) for result in bench.product(product)]
    chosen = choice.automatic(bench.device) or ""
    console.print(products_table(measured, config, peaks, chosen))
    console.print(costs_table(bench.costs(), config))
    bench.say("done")


def products(config: ProductsConfig) -> Iterator[Product]:
    for rows in config.rows:
        for columns, depth in config.shapes:
            yield Product(0, rows, columns, depth)
    for experts, rows in config.groups:
        for columns, depth in config.grouped_shapes:
            yield Product(experts, experts * rows, columns, depth)


class ProductsBench:
    """All measurements of one config, on one device."""

    def __init__(self, config: ProductsConfig, console: Console):
        self.config, self.console, self.began = config, console, time.monotonic()
        self.device = torch.device(config.device)
        self.backends = choice.available(self.device)
        if config.device == "cuda":
            self.backends.remove("reference")  # it emulates, for minutes
            if not self.backends:
                choice.choose("auto", self.device)  # says why
        self.say(f"backends: {', '.join(self.backends)}")

    def say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self.began:4.0f} s  {text}", highlight=False, soft_wrap=True)

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of one call, the median of many; on a GPU by its own clock, with nothing in its L2."""
        if self.device.type == "cuda":
            from triton.testing import do_bench

            work()  # looks for the fastest configuration, or compiles
            return do_bench(work, rep=1000 * self.config.seconds, return_mode="median") / 1000
        times = []
        for _ in range(CPU_REPEATS):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return median(times)

    def peaks(self) -> dict[str, float]:
        """Operations per second of a large square product, by "fp8" (one scale each) and "bf16"."""
        side = self.config.matmul
        left, right = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        work: dict[str, Callable[[], object]] = {BF16: lambda: left @ right.T}
        if self.device.type == "cuda":
            one, kind = torch.ones((), device=self.device), ScalingType.TensorWise
            a, b = left.to(FP8), right.to(FP8)
            work["fp8"] = lambda: F.scaled_mm(a, b.T, one, kind, one, kind, use_fast_accum=True)
        return {name: 2 * side**3 / self.timed(call) for name, call in work.items()}

    def product(self, product: Product) -> Iterator[Measured]:
        """BF16 and every backend; one that does not take the product is left out, and why is said."""
        operands = self.operands(product)
        exact = multiplied(product, operands.x, operands.weight)
        rounded = multiplied(product, dequantise(operands.x_fp8), dequantise(operands.weight_fp8))
        for backend in (BF16, *self.backends):
            self.say(f"{product}: {backend}")
            work = self.work(product, backend, operands)
            try:
                out, seconds = work(), self.timed(work)
            except (RuntimeError, ValueError) as error:  # torch's, cuBLAS's or DeepGEMM's
                reason = str(error).partition("\n")[0]
                self.say(f"{product}: {backend}: {reason}; left out")
                continue
            own = None if backend == BF16 else apart(out, rounded)
            yield Measured(product, backend, seconds, apart(out, exact), own)

    def operands(self, product: Product) -> Operands:
        draw = torch.Generator(self.device).manual_seed(0)
        shape = [product.experts] * bool(product.experts) + [product.columns, product.depth]
        x = torch.randn(product.rows, product.depth, generator=draw, device=self.device).bfloat16()
        weight = torch.randn(shape, generator=draw, device=self.device).bfloat16()
        experts = max(1, product.experts)
        each = product.rows // experts
        ends_E = torch.arange(1, experts + 1, device=self.device, dtype=torch.int32) * each
        kernels = self.kernels(self.backends[0])
        return Operands(x, weight, kernels.quantise_tiles(x), kernels.quantise_blocks(weight), ends_E)

    def kernels(self, backend: str) -> Any:
        return choice.choose(backend, self.device)

    def work(self, product: Product, backend: str, given: Operands) -> Callable[[], Tensor]:
        """The backend's product, ready to be called."""
        x, weight, ends_E, dtype = given.x, given.weight, given.ends_E, torch.bfloat16
        if backend == BF16 and product.experts:
            return lambda: F.grouped_mm(x, weight.mT, offs=ends_E)
        if backend == BF16:
            return lambda: x @ weight.T
        kernels = self.kernels(backend)
        if product.experts:
            return lambda: kernels.grouped_multiply(given.x_fp8, given.weight_fp8, ends_E, dtype)
        return lambda: kernels.multiply(given.x_fp8, given.weight_fp8, dtype)

    def costs(self) -> list[Cost]:
        """What each way to quantise takes, and as much as the device can do: a copy."""
        rows, columns = self.config.quantised
        x = torch.randn(rows, columns, device=self.device).bfloat16()
        copy, ends = torch.empty_like(x), torch.tensor([rows], device=self.device, dtype=torch.int32)
        backend = self.backends[-1]  # the others have Triton's
        kernels = self.kernels(backend)
        self.say(f"quantising {rows} x {columns}: {backend}")
        ways: dict[str, Callable[[], object]] = {
            "tiles": lambda: kernels.quantise_tiles(x),
            "blocks": lambda: kernels.quantise_blocks(x),
            "tokens": lambda: kernels.quantise_tokens(x, ends),
            "both": lambda: kernels.quantise_both(x, ends),
        }
        costs = [Cost("copy", self.timed(lambda: copy.copy_(x)), 2 * size_of(x))]
        for name, way in ways.items():
            costs.append(Cost(name, self.timed(way), size_of(x) + size_of(way())))
        return costs


def size_of(given: Any) -> int:
    """Bytes of a tensor, or of all in a tuple."""
    return given.nbytes if isinstance(given, Tensor) else sum(map(size_of, given))


def multiplied(product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """The product in float64, [M, N]."""
    if not product.experts:
        return x.double() @ weight.double().T
    parts = zip(x.chunk(product.experts), weight, strict=True)
    return torch.cat([part.double() @ one.double().T for part, one in parts])


def apart(out: Tensor, exact: Tensor) -> float:
    """How far a product is from the exact one, relatively, in the Frobenius norm."""
    return ((out.double() - exact).norm() / exact.norm()).item()


def products_table(
    measured: Sequence[Measured], config: ProductsConfig, peaks: dict[str, float], chosen: str
) -> Table:
    """A line for each backend and product. `chosen` is what engine.kernels=auto takes."""
    shown_peaks = ", ".join(f"{name} {peak / TERA:,.0f}" for name, peak in peaks.items())
    title = f"products [M, K] x [N, K]; measured peaks in TFLOPS: {shown_peaks}"
    figures = ("us", "TFLOPS", "of peak", "error", "without E4M3's", "faster than BF16 by")
    table = new_table(title, ("M, N x K", "backend"), figures)
    bf16_seconds = {result.product: result.seconds for result in measured if result.backend == BF16}
    for index, result in enumerate(measured):
        is_bf16 = result.backend == BF16
        bf16 = None if is_bf16 else bf16_seconds.get(result.product)
        ratio = None if bf16 is None else speedup(result.seconds, bf16)
        peak = peaks.get(BF16 if is_bf16 else "fp8")
        flops = result.product.flops / result.seconds
        following = measured[index + 1 : index + 2]
        table.add_row(
            str(result.product),
            result.backend,
            f"{1e6 * result.seconds:,.1f}",
            f"{flops / TERA:,.1f}",
            f"{flops / peak:.1%}" if peak else "",
            f"{result.error:.2e}",
            "" if result.own_error is None else f"{result.own_error:.2e}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if ratio is None else judgement(result, config, ratio, chosen),
            end_section=not following or following[0].product != result.product,
        )
    return table


def judgement(result: Measured, config: ProductsConfig, ratio: float, chosen: str) -> str:
    """Whether a large product reaches the floor of its backend and, if that is the chosen one, the goal."""
    if result.product.rows < config.judged_rows:
        return ""
    names = (["chosen"] if result.backend == chosen else []) + [result.backend]
    parts = [
        f"{name}: {reached(ratio, config.floors[name], None)}" for name in names if name in config.floors
    ]
    if result.backend == chosen and result.product.flops / result.seconds >= config.goal_tflops * TERA:
        parts.append(f"goal {config.goal_tflops:g} TFLOPS reached")
    return ", ".join(parts)


def costs_table(costs: Sequence[Cost], config: ProductsConfig) -> Table:
    """What quantising takes, beside a copy, which is as fast as memory."""
    rows, columns = config.quantised
    title = f"quantising {rows} x {columns} from bfloat16"
    table = new_table(title, ["into"], ("us", "GB/s", "of a copy's"), judged=False)
    copied = costs[0].bytes / costs[0].seconds
    for cost in costs:
        speed = cost.bytes / cost.seconds
        table.add_row(
            cost.name, f"{1e6 * cost.seconds:,.1f}", f"{speed / GIGA:,.0f}", f"{speed / copied:.0%}"
        )
    return table
