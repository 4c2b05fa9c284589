"""DeepSeek-V3's FP8 arithmetic in plain torch: the reference for all other backends (V3 section 3.3).

Values are E4M3 (`float8_e4m3fn`, at most 448). A float32 scale belongs to a tile of 1 x 128 along the summed
axis, for activations and gradients, or to a block of 128 x 128, for weights; tiles and blocks at an edge are
smaller. A number is value * scale. Products of 128 values are summed unscaled, then scaled and added to the
result in float32: the "promotion" of section 3.3.2.

A value that is not finite turns its tile's scale, and all that is computed with it, into NaN: no check waits
for the device, and the step still ends in an error (see train/engine/). The optional argument `counts`, int64
[3], is increased by the number of values with the largest code, of nonzero values that became zero, and of
values that were not finite.

Axes: M, N, K of products [M, K] x [N, K] -> [M, N] (both with the summed axis last); R rows, C columns;
r and c their tiles; E experts; T tokens, sorted by expert; P places of the tokens (see `place_groups`);
I inner width of a SwiGLU.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
# The smallest amax with its own scale: far below any gradient that matters, and from here on scales and their
# inverses are normal float32 numbers.
FLOOR = 2.0**-100


class Scaled(NamedTuple):
    """FP8 numbers: values [..., R, C], and scales [..., R, c] of tiles or [..., r, c] of blocks."""

    values: Tensor
    scales: Tensor


# Each code's number; on the CPU a cast takes five times as long as a lookup.
NUMBERS = torch.arange(256, dtype=torch.uint8).view(FP8).float()


def numbers(values: Tensor) -> Tensor:
    """FP8 codes as float32, any shape."""
    if values.device.type != "cpu":
        return values.float()
    codes = values.contiguous().view(torch.uint8).flatten().int()
    return NUMBERS.index_select(0, codes).view(values.shape)


def tiles(size: int) -> int:
    return -(-size // TILE)


def scale_of(amax: Tensor, power_of_two: bool = False) -> Tensor:
    """amax -> scale, float32: the largest magnitude becomes 448.

    With `power_of_two` (UE8M0) it is the next power of two: scaling is then exact, and a number quantised
    along one axis and then along the other (Wgrad) is rounded once.
    """
    scale = amax.clamp(min=FLOOR) / LARGEST
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [1/2, 1)
        whole = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
        scale = torch.where(scale.isfinite(), whole, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


def _spread(scales: Tensor, shape: torch.Size, rows: int) -> Tensor:
    """Each tile's scale at each of its elements, [..., R, C]."""
    wide = scales.repeat_interleave(TILE, -1)[..., : shape[-1]]
    return wide if rows == 1 else wide.repeat_interleave(rows, -2)[..., : shape[-2], :]


def _quantise(x: Tensor, rows: int, power_of_two: bool, counts: Tensor | None) -> Scaled:
    padded = F.pad(x.float(), (0, -x.shape[-1] % TILE, 0, -x.shape[-2] % rows))  # whole tiles
    amax = padded.abs().unflatten(-1, (-1, TILE)).unflatten(-3, (-1, rows)).amax(dim=(-3, -1))
    scales = scale_of(amax, power_of_two)
    scaled = x.float() / _spread(scales, x.shape, rows)
    values = scaled.clamp(-LARGEST, LARGEST).to(FP8)
    if counts is not None:
        codes = values.view(torch.uint8) & 0x7F  # without sign: 0x7E is 448, 0 is zero
        flushed = (codes == 0) & (x != 0)
        counts[:2] += torch.stack([torch.count_nonzero(of) for of in (codes == 0x7E, flushed)])
        if scales.isnan().any():
            counts[2] += torch.count_nonzero(~x.isfinite())
    return Scaled(values, scales)


def quantise_tiles(x: Tensor, power_of_two: bool = False, counts: Tensor | None = None) -> Scaled:
    """x [..., R, C] -> values [..., R, C], scales [..., R, c]."""
    return _quantise(x, 1, power_of_two, counts)


def quantise_blocks(x: Tensor, power_of_two: bool = False, counts: Tensor | None = None) -> Scaled:
    """x [..., R, C] -> values [..., R, C], scales [..., r, c]."""
    return _quantise(x, TILE, power_of_two, counts)


def dequantise(x: Scaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> [..., R, C]."""
    rows = 1 if x.scales.shape[-2] == x.values.shape[-2] else TILE
    return (numbers(x.values) * _spread(x.scales, x.values.shape, rows)).to(dtype)


def transposed(weight: Scaled) -> Scaled:
    """Blocks [..., R, C] as blocks [..., C, R]: the summed axis of Dgrad last and contiguous."""
    return Scaled(weight.values.mT.contiguous(), weight.scales.mT.contiguous())


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a [M, K] in tiles times b [N, K] in blocks (Fprop, Dgrad) or tiles (Wgrad) -> [M, N] in `dtype`."""
    (rows, depth), columns = a.values.shape, b.values.shape[0]
    scales_b = b.scales
    if len(scales_b) != columns:  # blocks
        scales_b = scales_b.repeat_interleave(TILE, 0)[:columns]
    values_a, values_b = numbers(a.values), numbers(b.values)
    total = torch.zeros(rows, columns, device=a.values.device)
    for k in range(tiles(depth)):
        part = slice(k * TILE, (k + 1) * TILE)
        product = values_a[:, part] @ values_b[:, part].T
        total += product * (a.scales[:, k, None] * scales_b[None, :, k])
    return total.to(dtype)


def grouped_multiply(a: Scaled, b: Scaled, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of expert e times its matrix: a [T, K] in tiles, b [E, N, K] in blocks -> [T, N] in `dtype`.

    Expert e has the rows from ends_E[e - 1] to ends_E[e] (int32), none included.
    """
    out = torch.zeros(len(a.values), b.values.shape[1], dtype=dtype, device=a.values.device)
    first = 0
    for expert, end in enumerate(ends_E.tolist()):
        rows = slice(first, end)
        if end > first:
            left, right = Scaled(a.values[rows], a.scales[rows]), Scaled(b.values[expert], b.scales[expert])
            out[rows] = multiply(left, right, dtype)
        first = end
    return out


def places_for(tokens: int, experts: int) -> int:
    """P: enough places for `tokens` however they are routed, so that nothing waits for the device."""
    return (tokens + (TILE - 1) * min(experts, tokens)) // TILE * TILE


def place_groups(ends_E: Tensor) -> Tensor:
    """The first place of each expert's tokens, each at the start of a tile, [E], int32."""
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    filled_E = (counts_E + TILE - 1) // TILE * TILE
    return (filled_E.cumsum(0) - filled_E).to(ends_E.dtype)


def place_tokens(tokens: int, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's place among P, and its expert; both [T]."""
    index_T = torch.arange(tokens, device=ends_E.device)
    experts_T = torch.searchsorted(ends_E, index_T, right=True)
    firsts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    return index_T + (place_groups(ends_E) - firsts_E)[experts_T], experts_T


def quantise_tokens(
    x: Tensor, ends_E: Tensor, power_of_two: bool = False, counts: Tensor | None = None
) -> Scaled:
    """x [T, C] in tiles along tokens, for Wgrad: values [C, P], scales [C, p].

    No tile has two experts' tokens. Places without a token are zero. Without experts, `ends_E` is [T].
    """
    tokens, width = x.shape
    places_T, _ = place_tokens(tokens, ends_E)
    placed = x.new_zeros(places_for(tokens, len(ends_E)), width).index_copy(0, places_T, x)
    return quantise_tiles(placed.T.contiguous(), power_of_two, counts)


def quantise_both(
    x: Tensor, ends_E: Tensor, power_of_two: bool = False, counts: Tensor | None = None
) -> tuple[Scaled, Scaled]:
    """x [T, C] in tiles and in tiles along tokens: a gradient's operands in Dgrad and Wgrad."""
    return quantise_tiles(x, power_of_two, counts), quantise_tokens(x, ends_E, power_of_two)


def requantise_tokens(x: Scaled, ends_E: Tensor, power_of_two: bool = False) -> Scaled:
    """Tiles [T, C] in tiles along tokens: an activation saved for Wgrad."""
    return quantise_tokens(dequantise(x), ends_E, power_of_two)


def grouped_outer(a: Scaled, b: Scaled, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Wgrad: a [M, P] and b [N, P] from `quantise_tokens` -> [E, M, N], zero for experts without tokens."""
    out = torch.zeros(len(ends_E), len(a.values), len(b.values), dtype=dtype, device=a.values.device)
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    for expert, (start, count) in enumerate(zip(place_groups(ends_E).tolist(), counts, strict=True)):
        if count:
            places = slice(start, start + tiles(count) * TILE)
            groups = slice(start // TILE, start // TILE + tiles(count))
            left, right = (Scaled(x.values[:, places], x.scales[:, groups]) for x in (a, b))
            out[expert] = multiply(left, right, dtype)
    return out


def swiglu(gate_up: Tensor, weights_T: Tensor | None) -> Tensor:
    """silu(gate) * up * weight of each token, [T, I] in float32; `gate_up` [T, 2I], gate first."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    inner = F.silu(gate) * up
    return inner if weights_T is None else inner * weights_T.float().unsqueeze(-1)


def swiglu_quantise(
    gate_up: Tensor, weights_T: Tensor | None, power_of_two: bool = False, counts: Tensor | None = None
) -> Scaled:
    """`swiglu` in tiles: values [T, I], scales [T, i]."""
    return quantise_tiles(swiglu(gate_up, weights_T), power_of_two, counts)


def swiglu_backward(
    gate_up: Scaled, weights_T: Tensor | None, d_inner_TI: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From SwiGLU's saved input: (its output [T, I], d_gate_up [T, 2I], d_weights_T or None).

    The first two are in the type of `d_inner_TI`.
    """
    gate, up = dequantise(gate_up).chunk(2, dim=-1)
    d_inner, chance = d_inner_TI.float(), torch.sigmoid(gate)
    silu = gate * chance
    inner = silu * up
    d_weights_T = None
    if weights_T is not None:
        d_weights_T = (d_inner * inner).sum(dim=-1)
        weights = weights_T.float().unsqueeze(-1)
        inner, d_inner = inner * weights, d_inner * weights
    d_gate = d_inner * up * (chance + silu * (1 - chance))
    d_gate_up = torch.cat([d_gate, d_inner * silu], dim=-1)
    return inner.to(d_inner_TI.dtype), d_gate_up.to(d_inner_TI.dtype), d_weights_T
