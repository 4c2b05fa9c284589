"""What came out of an optimizer step, and its metrics. Axis suffixes: L MoE layers, E routed experts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from r1pipe.model import max_vio

EXPERTS_SHOWN = 64  # most experts of a layer whose loads are logged one by one


@dataclass
class StepStats:
    """The result of one optimizer step."""

    loss: float  # mean over ranks
    grad_norm: float  # global norm before clipping
    lr: float  # learning rate of this step
    loads_LE: Tensor | None  # tokens per expert of this step, all ranks together
    fp8: dict[str, float]  # quantisation metrics over all ranks; empty without FP8
    broken: bool  # not finite: nothing was updated, loss or grad_norm is NaN or inf
    skipped: int  # broken steps since the stage began


def shown(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics for the progress display; a skipped step has no loss."""
    return {"loss": metrics["train/loss"]} if "train/loss" in metrics else {}


def step_metrics(stats: StepStats) -> dict[str, float]:
    """The metrics of an optimizer step; a skipped one has only the learning rate and `train/skipped`, the
    count of skipped steps, which is logged from the first one on.

    `router/max_vio` is the worst layer's, `router/max_vio/L` that of MoE layer L (counted from 0), and
    `router/load/L/E` the load of its expert E over the layer's mean: 1 is even. Layers of more than
    EXPERTS_SHOWN experts would flood the log, so they only have MaxVio.
    """
    skipped = {"train/skipped": float(stats.skipped)} if stats.skipped else {}
    if stats.broken:
        return {"train/lr": stats.lr, **skipped}
    metrics = {"train/loss": stats.loss, "train/lr": stats.lr, "train/grad_norm": stats.grad_norm, **skipped}
    metrics |= stats.fp8
    if stats.loads_LE is None:
        return metrics
    used = [(n, loads_E) for n, loads_E in enumerate(stats.loads_LE) if loads_E.any()]  # MTP idles in RL
    if used:
        violation_L = max_vio(torch.stack([loads_E for _, loads_E in used]))
        metrics["router/max_vio"] = violation_L.max().item()
        metrics["router/max_vio_mean"] = violation_L.mean().item()
        metrics |= {f"router/max_vio/{n}": v for (n, _), v in zip(used, violation_L.tolist(), strict=True)}
    for n, loads_E in used:
        if len(loads_E) > EXPERTS_SHOWN:
            continue
        shares = (loads_E / loads_E.mean()).tolist()
        metrics |= {f"router/load/{n}/{expert}": round(load, 4) for expert, load in enumerate(shares)}
    return metrics
