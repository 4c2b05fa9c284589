"""Where the time of a step goes: torch's profiler over one call, its kernels in four kinds."""

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = ("GEMMs", "quantisation", "attention", "other")
ATTENTION = re.compile("attention|flash|fmha|flex")  # asked first: its kernels are made of matrix products
PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|\b_?(?:scaled_|grouped_|add|b)?mm\b")
OURS = {"r1pipe.model.kernels.triton_products": "GEMMs"}  # other modules of Triton kernels quantise


def shares(step: Callable[[], object], cuda: bool) -> dict[str, float]:
    """The share of each kind in the time that `step` spends in the device's kernels.

    On a CPU kernels are torch's operators, and quantising by the reference is among the others.
    """
    known = triton_kernels()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        step()
        if cuda:
            torch.cuda.synchronize()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in record.events():
        if cuda and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spent[kind_of(event.name, known)] += event.time_range.elapsed_us()
        elif not cuda:
            spent[kind_of(event.name, known)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: time / whole if whole else 0.0 for kind, time in spent.items()}


def kind_of(name: str, known: dict[str, str]) -> str:
    """One of KINDS, from a kernel's or an operator's name; `known` names ours."""
    if name in known:
        return known[name]
    if ATTENTION.search(name):
        return "attention"
    return "GEMMs" if PRODUCTS.search(name) else "other"


def triton_kernels() -> dict[str, str]:
    """The name of each of our Triton kernels, as far as they are imported, and its kind."""
    kinds: dict[str, str] = {}
    for module in [name for name in sys.modules if name.startswith("r1pipe.model.kernels.triton_")]:
        found: dict[str, Any] = vars(sys.modules[module])
        own = {name: value for name, value in found.items() if hasattr(value, "fn") and name.startswith("_")}
        kinds |= dict.fromkeys(own, OURS.get(module, "quantisation"))
    return kinds
