"""Backward passes in two halves: the gradients of whole ones, and no product more."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from shapes import ours, tiny
from test_kernel_checks import ENTRIES, Recorder, library
from test_pipeline_parallel import ROWS, learn, micro_batches, read
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.flop_counter import FlopCounterMode

from r1pipe.model import DeepseekV3, logprobs
from r1pipe.model.kernels import reference
from r1pipe.model.kernels import training as kernels
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.kernels.fp8 import FP8
from r1pipe.model.kernels.halves import inputs_first
from r1pipe.model.parts import Part
from r1pipe.model.training import compute_in

__all__ = ["library"]  # a fixture

WEIGHTS = ("gate_up_EiD", "down_EDI", "gate_ID", "up_ID", "down_DI", "weight_D", "weight_OD", "weight_VD")
Function = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]  # of inputs and weights


def whole(function: Function, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    out = function(inputs, weights)
    return [*torch.autograd.grad([out], [*inputs, *weights], [torch.ones_like(out)])]


def in_halves(function: Function, inputs: Sequence[Tensor], weights: Sequence[Any]) -> list[Tensor]:
    """As a pipeline's I and W."""
    out = function(inputs, weights)
    with inputs_first():
        found, later = stage_backward_input([out], [torch.ones_like(out)], [*inputs], iter(weights))
    assert all(weight.grad is None for weight in weights)
    stage_backward_weight(iter(weights), later)
    return [*found, *(weight.grad for weight in weights)]  # type: ignore[list-item]


def entry(name: str) -> tuple[Function, list[Tensor], list[Tensor]]:
    """A CPU kernel as a function of its inputs and weights."""
    kernel, given = ENTRIES[name]
    learned = {key: value.is_floating_point() for key, value in given.items() if isinstance(value, Tensor)}
    weights = {
        k: given[k].clone().requires_grad_() for k, is_float in learned.items() if is_float and k in WEIGHTS
    }
    inputs = {
        k: given[k].clone().requires_grad_()
        for k, is_float in learned.items()
        if is_float and k not in WEIGHTS
    }

    def function(own: Sequence[Tensor], of_weights: Sequence[Tensor]) -> Tensor:
        named = dict(zip([*inputs, *weights], [*own, *of_weights], strict=True))
        return kernel(**given | named) * 1  # no view

    return function, [*inputs.values()], [*weights.values()]


KERNELS = [name for name in ENTRIES if name != "pack"]


@pytest.mark.parametrize("name", KERNELS)
def test_two_halves_call_what_a_whole_pass_does(name: str, library: Recorder) -> None:
    function, *operands = entry(name)
    whole(function, *operands)
    called, library.called = library.called, []
    in_halves(function, *operands)
    assert library.called == called and len(called) > 1


@pytest.mark.skipif(not runs_here(torch.float32), reason="the CPU kernels do not run here")
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernels_halves_have_the_bits_of_the_whole(name: str) -> None:
    function, *operands = entry(name)
    same(function, *operands)


def same(function: Function, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for a, b in zip(whole(function, inputs, weights), in_halves(function, inputs, weights), strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def last_part(model: DeepseekV3) -> tuple[Function, list[Tensor], list[Any]]:
    """The second half of a model, with multi-token prediction and balance loss, as a function of the first
    half's states."""
    [micro] = micro_batches(1, ROWS // 2)[:1]
    part = Part(model, 1, 2)

    def loss(part: Any) -> Tensor:
        hidden_BTD, balances = read(part, micro)
        return learn(part, micro, hidden_BTD, balances)[0] + 0.1 * balances[0].total()

    def function(states: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        return part.run(loss, states[0], training=True)[0]

    first = Part(model, 0, 2)
    _, states_ND = first.run(lambda part: read(part, micro), None, training=True)
    assert states_ND is not None
    return function, [states_ND.detach().requires_grad_()], part.parameters()


@pytest.mark.parametrize("kind", ["float32", "fp8", "a float32 head", "a head in chunks"])
def test_a_part_of_a_model_multiplies_no_more_in_two_halves(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's products, which FP8 is emulated with."""
    monkeypatch.setattr(kernels, "usable", lambda *given, **few: False)
    # torch's own: DeepSpeed's, which stays in a process that has once sharded weights, does all in each half
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    shape = tiny(num_hidden_layers=4, num_nextn_predict_layers=1, moe_intermediate_size=32, q_lora_rank=32)
    model = ours(shape).train()
    if kind == "fp8":
        compute_in(model, FP8(reference, power_of_two=False))
    if "head" in kind:
        model.bfloat16()
        model.lm_head.fp32 = True
    if kind == "a head in chunks":
        monkeypatch.setattr(logprobs, "LOGITS_IN_MEMORY", 5 * shape.vocab_size)
    function, *operands = last_part(model)
    found, products = [], []
    for run in (whole, in_halves):
        with FlopCounterMode(display=False) as counter:
            found.append(run(function, *operands))
        products.append(counter.get_total_flops())
    assert products[0] == products[1] > 1e5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
