"""What every entry into the C++ refuses before it hands pointers over; on any processor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import SHAPES, ours
from torch import Tensor

from r1pipe.model import native
from r1pipe.model.cache import LatentCache
from r1pipe.model.kernels import build, differentiable
from r1pipe.model.kernels import training as kernels
from r1pipe.model.native import NativeDecoder


class Recorder:
    """A library that notes which functions are called, and computes nothing."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *arguments: self.called.append(name) or 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(build, "library", lambda: recorder)
    return recorder


def floats(*shape: int) -> Tensor:
    return torch.rand(shape)


def rotation(*shape: int) -> Tensor:
    return torch.polar(torch.ones(shape), torch.rand(shape))


def integers(below: int, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64) + below - 1


MASK = torch.ones(2, 5, 5, dtype=torch.bool)
# entry -> (function, arguments that are right)
ENTRIES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "experts": (
        kernels.experts,
        {
            "x_ND": floats(7, 8),
            "gate_up_EiD": floats(4, 12, 8),
            "down_EDI": floats(4, 8, 6),
            "weights_NK": floats(7, 2),
            "experts_NK": integers(4, 7, 2),
        },
    ),
    "swiglu": (
        kernels.swiglu,
        {"x": floats(2, 3, 8), "gate_ID": floats(6, 8), "up_ID": floats(6, 8), "down_DI": floats(8, 6)},
    ),
    "attention": (
        kernels.attention,
        {
            "query_BTHq": floats(2, 5, 3, 10),
            "key_value_BMHw": floats(2, 5, 3, 14),
            "key_rope_BMR": floats(2, 5, 4),
            "rotation_BTr": rotation(2, 5, 2),
            "mask_BTM": MASK,
            "scale": 0.5,
        },
    ),
    "rms_norm": (kernels.rms_norm, {"x": floats(3, 8), "weight_D": floats(8), "eps": 1e-6}),
    "rotate": (kernels.rotate, {"x_BTR": floats(2, 5, 4), "rotation_BTr": rotation(1, 5, 2)}),
    "linear": (kernels.linear, {"x": floats(3, 8), "weight_OD": floats(6, 8)}),
    "logprobs": (
        kernels.logprobs,
        {
            "x_ND": floats(3, 8),
            "weight_VD": floats(10, 8),
            "targets_N": integers(10, 3),
            "temperature": 1.0,
        },
    ),
    "pack": (native.pack, {"weight": floats(3, 70, 8)}),
}
TENSORS = [
    (entry, name)
    for entry, (_, arguments) in ENTRIES.items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_right_arguments_reach_the_kernel(entry: str, library: Recorder) -> None:
    function, arguments = ENTRIES[entry]
    function(**arguments)
    assert len(library.called) == 1


@pytest.mark.parametrize(("entry", "name"), TENSORS)
def test_wrong_tensors_are_refused_before_the_kernel_is_called(
    entry: str, name: str, library: Recorder
) -> None:
    function, arguments = ENTRIES[entry]
    right = arguments[name]
    wrong = {
        "type": right.double() if right.is_floating_point() else right.float(),
        "smaller type": right.half() if right.is_floating_point() else right.to(torch.int32),
        "device": right.to("meta"),
        "empty": right[:0],
        "dimensions": right[0, ..., 0] if right.ndim > 1 else right.unsqueeze(0),
    }
    if entry != "pack" and name != "key_value_BMHw":  # whose last axis may have any size
        wrong["size"] = right.repeat_interleave(3, dim=-1)
    if name in ("weights_NK", "rotation_BTr"):
        wrong["bfloat16"] = right.real.bfloat16()
    if entry in ("rms_norm", "swiglu", "linear") and name == "x":
        wrong["dimensions"] = torch.tensor(1.0)
    if entry == "pack":
        wrong["dimensions"] = floats(8)
    for what, value in wrong.items():
        with pytest.raises(ValueError, match=r"must be|fit|need|queries") as error:
            function(**arguments | {name: value})
            pytest.fail(f"{name} of wrong {what} was taken")
        assert "\n" not in str(error.value)
    assert library.called == []


@pytest.mark.parametrize(("entry", "name"), [("experts", "experts_NK"), ("logprobs", "targets_N")])
@pytest.mark.parametrize("value", [-1, 10])
def test_indices_out_of_range_are_refused(entry: str, name: str, value: int, library: Recorder) -> None:
    function, arguments = ENTRIES[entry]
    with pytest.raises(ValueError, match=rf"must be from 0 to \d, not from {value}"):
        function(**arguments | {name: torch.full_like(arguments[name], value)})
    assert library.called == []


def test_bfloat16_takes_even_sizes_alone(library: Recorder) -> None:
    with pytest.raises(ValueError, match="need even sizes, but outputs is 7"):
        kernels.linear(floats(3, 8).bfloat16(), floats(7, 8).bfloat16())
    with pytest.raises(ValueError, match="need even sizes, but depth is 7"):
        native.pack(floats(8, 7).bfloat16())
    kernels.linear(floats(3, 8).bfloat16(), floats(6, 8).bfloat16())
    assert library.called == ["r1pipe_linear_forward"]


def test_keys_without_a_mask_are_as_many_as_tokens(library: Recorder) -> None:
    arguments = ENTRIES["attention"][1] | {"mask_BTM": None}
    kernels.attention(**arguments)
    more = {"key_value_BMHw": floats(2, 9, 3, 14), "key_rope_BMR": floats(2, 9, 4)}
    with pytest.raises(ValueError, match="5 tokens that attend to 9 keys need a mask"):
        kernels.attention(**arguments | more)


def test_views_are_handed_over_as_neighbours(monkeypatch: pytest.MonkeyPatch, library: Recorder) -> None:
    given: list[Any] = []
    monkeypatch.setattr(differentiable, "call", lambda name, *arguments: given.extend(arguments))
    for function, arguments in ENTRIES.values():
        if function is not native.pack:
            function(**{k: spread(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})
    tensors = [value for value in given if isinstance(value, Tensor)]
    assert len(tensors) > 20 and all(tensor.is_contiguous() for tensor in tensors)


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, none of them neighbours."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def test_where_the_kernels_do_not_run_a_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "library", lambda: None)
    with pytest.raises(ValueError, match="kernel linear_forward cannot be called"):
        kernels.linear(floats(3, 8), floats(6, 8))


# --- the decoder


@pytest.fixture
def decoder(library: Recorder, monkeypatch: pytest.MonkeyPatch) -> NativeDecoder:
    monkeypatch.setattr(native, "runs_here", lambda dtype: True)
    made = NativeDecoder(ours(SHAPES["v3"]))
    library.called.clear()
    return made


def test_a_decoder_takes_what_fits_alone(decoder: NativeDecoder, library: Recorder) -> None:
    cache = LatentCache(decoder.model, 2, 12)
    tokens, positions = torch.tensor([1, 2]), torch.tensor([0, 11])
    decoder.decode(tokens, positions, cache, 12)
    assert library.called == ["r1pipe_forward"]
    for name, arguments in {
        "tokens": (tokens + 96, positions, cache),
        "positions": (tokens, positions + 1, cache),
        "slots": (torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2]), cache),
        "cache": (tokens, positions, LatentCache(ours(SHAPES["v3"]).bfloat16(), 2, 12)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must"):
            decoder.decode(*arguments, 12)
    for wrong in (tokens.int(), tokens.float(), tokens[:1], tokens.to("meta")):
        with pytest.raises(ValueError, match=r"^(tokens|positions) must be torch\.int64"):
            decoder.decode(wrong, positions, cache, 12)
    with pytest.raises(ValueError, match=r"^wanted must be from 0"):
        decoder.prefill(torch.ones(2, 5, dtype=torch.long), torch.tensor([0, 5]))
    assert len(library.called) == 1


def test_a_decoder_of_a_model_that_does_not_fit_is_refused(
    library: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "runs_here", lambda dtype: dtype in (torch.float32, torch.bfloat16))
    mixed, cut = ours(SHAPES["v3"]), ours(SHAPES["v3"])
    mixed.lm_head.bfloat16()
    cut.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(floats(3, 3))
    for model in (ours(SHAPES["v3"]).half(), mixed, cut):
        with pytest.raises(ValueError, match="do not run here, or not for this model"):
            NativeDecoder(model)
    assert library.called == []
