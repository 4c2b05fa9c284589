"""The measured products and the costs of quantising as tables, and what they are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from r1pipe.bench.arithmetic import speedup
from r1pipe.bench.config import ProductsConfig

if TYPE_CHECKING:
    from r1pipe.bench.products import Cost, Measured

TERA, GIGA = 1e12, 1e9


def products_table(
    measured: Sequence[Measured], config: ProductsConfig, peaks: dict[str, float], chosen: str
) -> Table:
    """A line for each backend and product. `chosen` is what engine.kernels=auto takes."""
    told = ", ".join(f"{name} {peak / TERA:,.0f}" for name, peak in peaks.items())
    table = Table(title=f"products [M, K] x [N, K]; measured peaks in TFLOPS: {told}", title_justify="left")
    for heading in ("M, N x K", "backend"):
        table.add_column(heading)
    for heading in ("us", "TFLOPS", "of peak", "error", "without E4M3's", "faster than BF16 by"):
        table.add_column(heading, justify="right")
    table.add_column("judged")
    by_product = {result.product: result for result in measured if result.backend == "bf16"}
    for index, result in enumerate(measured):
        bf16 = by_product.get(result.product)
        ratio = speedup(result.seconds, bf16.seconds) if bf16 and bf16 is not result else None
        peak = peaks.get("bf16" if bf16 is result else "fp8")
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
    said = []
    for name in names:
        floor = config.floors.get(name)
        if floor is not None:
            said.append(f"{name}: floor {floor:g} {'reached' if ratio >= floor else 'MISSED'}")
    if result.backend == chosen and result.product.flops / result.seconds >= config.goal_tflops * TERA:
        said.append(f"goal {config.goal_tflops:g} TFLOPS reached")
    return ", ".join(said)


def costs_table(costs: Sequence[Cost], config: ProductsConfig) -> Table:
    """What quantising takes, beside a copy: all are as fast as memory at best."""
    rows, columns = config.quantised
    table = Table(title=f"quantising {rows} x {columns} from bfloat16", title_justify="left")
    table.add_column("into")
    for heading in ("us", "GB/s", "of a copy's"):
        table.add_column(heading, justify="right")
    copied = costs[0].bytes / costs[0].seconds
    for cost in costs:
        speed = cost.bytes / cost.seconds
        table.add_row(
            cost.name, f"{1e6 * cost.seconds:,.1f}", f"{speed / GIGA:,.0f}", f"{speed / copied:.0%}"
        )
    return table
