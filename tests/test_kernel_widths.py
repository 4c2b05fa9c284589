"""The compiled kernels at every width: what fills no register, block or panel, and masks of any shape."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from r1pipe.model.kernels import training as kernels
from r1pipe.model.kernels.build import runs_here

pytestmark = pytest.mark.skipif(not runs_here(torch.float32), reason="the CPU kernels do not run here")
WIDTHS = [*range(1, 19), 31, 33, 47, 63, 64, 65, 98]


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_()


def same(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Results and gradients are those of `reference` in float64, within rounding."""
    out = kernel(*inputs)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = reference(*exact_inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weight).sum(), inputs)
    slopes = torch.autograd.grad((exact * weight).sum(), exact_inputs)
    for one, other in zip((out, *found), (exact, *slopes), strict=True):
        assert (one - other).norm() <= 1e-5 * (other.norm() + 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width):
    x, weight = numbers(5, width), numbers(width)
    same(lambda x, w: kernels.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, (width,), w, 1e-6), x, weight)
    gate, up, down = numbers(width, 9), numbers(width, 9), numbers(9, width)
    same(
        kernels.swiglu,
        lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
        *(numbers(20, 9), gate, up, down),
    )
    same(kernels.linear, F.linear, numbers(3, width), numbers(10, width))
    targets = torch.arange(7) % width
    same(
        lambda x, w: kernels.logprobs(x, w, targets, 0.7),
        lambda x, w: -F.cross_entropy(F.linear(x, w) / 0.7, targets, reduction="none"),
        *(numbers(7, 6), numbers(width, 6)),
    )


@pytest.mark.parametrize("rows", [*range(1, 14), 63, 64, 65])
def test_products_of_any_number_of_rows_have_the_bits_of_each_row(rows):
    x, weight = numbers(rows, 37), numbers(83, 37)
    same(kernels.linear, F.linear, x, weight)
    alone = torch.cat([kernels.linear(row, weight) for row in x.split(1)])
    assert torch.equal(kernels.linear(x, weight), alone)


def turned(x: Tensor, rotation_TR: Tensor) -> Tensor:
    """The pairs of x [B, T, H, R], rotated."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation_TR.to(pairs.dtype)[:, None]).flatten(-2)


@pytest.mark.parametrize(
    "tokens, keys, nope, rope, value",
    [(1, 1, 1, 2, 1), (3, 5, 3, 6, 7), (17, 17, 16, 16, 32), (64, 65, 5, 2, 15), (66, 130, 9, 34, 17)],
)
def test_attention_of_any_width_with_any_mask(tokens, keys, nope, rope, value):
    mask = torch.rand(2, tokens, keys, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[:, :, 0] = True  # each looks somewhere
    angles = torch.rand(1, tokens, rope // 2, generator=torch.Generator().manual_seed(3))
    rotation = torch.polar(torch.ones_like(angles), angles)

    def kernel(query: Tensor, key_value: Tensor, key_rope: Tensor) -> Tensor:
        return kernels.attention(query, key_value, key_rope, rotation, mask, 0.3)

    def reference(query: Tensor, key_value: Tensor, key_rope: Tensor) -> Tensor:
        rotated = torch.cat([query[..., :nope], turned(query[..., nope:], rotation[0])], -1)
        shared = key_rope.unsqueeze(2).expand(-1, -1, 3, -1)
        key = torch.cat([key_value[..., :nope], shared], -1)
        scores = 0.3 * torch.einsum("bthq,bmhq->bhtm", rotated, key)
        weights = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
        return torch.einsum("bhtm,bmhv->bthv", weights, key_value[..., nope:])

    inputs = numbers(2, tokens, 3, nope + rope), numbers(2, keys, 3, nope + value), numbers(2, keys, rope)
    same(kernel, reference, *inputs)


def test_exponentials_at_their_ends():
    """Logits as far apart as floats go, and one that is no number."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0.0, -1e30, -90.0, -inf], [3e38, 3e38, 0.0, 0.0], [0.0, nan, 0.0, 0.0]])
    found = kernels.logprobs_of(logits, torch.tensor([0, 1, 0]))
    assert found[0] == 0 and found[1] == pytest.approx(-0.6931472) and found[2].isnan()
    x = torch.tensor([[100.0], [-100.0], [1e30], [nan]])
    out = kernels.swiglu(x, *(torch.ones(1, 1) for _ in range(3)))
    assert out[0] == 1e4 and abs(out[1]) < 1e-30 and out[2].isinf() and out[3].isnan()
