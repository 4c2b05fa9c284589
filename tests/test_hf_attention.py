"""Attention of short rows: about as near to float32 as torch's own kernel, and taken where it should be."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_models import write_model
from torch import Tensor

from r1pipe.model import load_pretrained
from r1pipe.model.hf import attention

Tensors = tuple[Tensor, ...]


def inputs(tokens: int, keys: int) -> Tensors:
    """Query, key and value of 3 rows, 6 heads and 2 key-value heads, in bfloat16's values; and a mask in
    which each query sees itself."""
    drawn = torch.Generator().manual_seed(0)
    shapes = ((3, 6, tokens, 16), (3, 2, keys, 16), (3, 2, keys, 16))
    states = (torch.randn(shape, generator=drawn).bfloat16().float() for shape in shapes)
    mask = torch.rand(3, 1, tokens, keys, generator=drawn) < 0.5
    return (*states, mask | torch.eye(keys, dtype=torch.bool)[keys - tokens :])


def results(attend, dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensors:
    """Output and gradients."""
    states = [tensor.to(dtype).clone().requires_grad_() for tensor in (query, key, value)]
    out = attend(*states, mask)
    (out.float() ** 2).sum().backward()
    return (out.float(), *(tensor.grad.float() for tensor in states))  # type: ignore[union-attr]


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    layer = torch.nn.Module()
    layer.num_key_value_groups = 3  # type: ignore[assignment]
    return attention.attend(layer, query, key, value, mask)[0]


def test_short_rows_are_as_exact_as_the_fused_kernel() -> None:
    given = inputs(7, 20)
    exact = results(fused, torch.float32, *given)
    found, known = (results(attend, torch.bfloat16, *given) for attend in (ours, fused))
    for right, one, other in zip(exact, found, known, strict=True):
        assert (one - right).norm() <= 1.05 * (other - right).norm()
        assert (one - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize(("tokens", "keys", "dtype"), [(1, 20, torch.bfloat16), (7, 20, torch.float32)])
def test_others_are_left_to_transformers(tokens: int, keys: int, dtype: torch.dtype, monkeypatch) -> None:
    given = inputs(tokens, keys)
    expected = results(fused, dtype, *given)
    monkeypatch.setattr(torch, "softmax", None)
    for one, other in zip(results(ours, dtype, *given), expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)  # bfloat16 in another order


def test_a_loaded_model_uses_it_and_is_saved_as_before(tmp_path: Path, monkeypatch) -> None:
    folder = write_model(tmp_path / "llama", "llama", torch.bfloat16)
    model = load_pretrained(folder)
    tokens_BT = torch.arange(12).unsqueeze(0)
    found = model(tokens_BT)
    model.whole.config._attn_implementation = "sdpa"
    assert (found - model(tokens_BT)).norm() < 0.03 * found.norm()
    model.whole.config._attn_implementation = attention.SDPA_OR_SHORT
    assert attention.SDPA_OR_SHORT not in model.whole.config.to_json_string()
    monkeypatch.setattr(torch, "softmax", None)
    with pytest.raises(TypeError, match="NoneType"):
        model(tokens_BT)
