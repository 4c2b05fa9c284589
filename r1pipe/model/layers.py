"""The model's smallest layers: RMSNorm, linear, SwiGLU, and rotary positions with YaRN.

Axes, in all of r1pipe/model: B rows, T tokens in a row, N tokens (B*T), D hidden width, H heads, E experts,
K experts per token, I expert width, C latent width (kv_lora_rank), R rotary width, r its pairs, L layers,
V vocabulary, S slots, P tokens of a past, M keys, W = C+R the width of a cache entry.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1pipe.config import ModelConfig
from r1pipe.model.kernels import training as kernels
from r1pipe.model.kernels.fp8 import Quantisable
from r1pipe.model.kernels.reference import dequantise

M = TypeVar("M", bound=nn.Module)


def give_memory(module: M, device: torch.device | str) -> M:
    """Move a module from the meta device to another, its values undefined. As torch's `to_empty`, which first
    imports a computer algebra system (a second of a core)."""
    return module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


class RMSNorm(nn.Module, kernels.Invariant):
    """x / rms(x) * weight over the last axis; any leading shape."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.usable(x):
            return kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear, Quantisable, kernels.Invariant):
    """x weight^T, without bias; any leading shape."""

    def __init__(self, width: int, outputs: int):
        super().__init__(width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is not None:
            return self.fp8.linear(x, self.weight, self.kind)
        if self.usable(x, self.out_features):
            return kernels.linear(x, self.weight)
        return super().forward(x)

    def rounded_weight(self) -> Tensor:
        """The weight [O, D] as forward uses it, rounded in FP8; without gradient."""
        if self.fp8 is None:
            return self.weight
        return dequantise(self.fp8.weight(self.kind, self.weight), self.weight.dtype)


class SwiGLU(nn.Module, Quantisable, kernels.Invariant):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        if self.fp8 is not None:
            return self.fp8.swiglu(x, *weights, self.kind)
        if self.usable(x, self.gate_proj.out_features):
            return kernels.swiglu(x, *weights)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _attention_temperature(factor: float, mscale: float) -> float:
    """YaRN's m = 0.1 * mscale * ln(factor) + 1 (YaRN, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(nope + rope), times m^2 where YaRN carries the temperature in the scores (V3 section 4.3)."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _attention_temperature(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _rotations(config: ModelConfig) -> Tensor:
    """e^(i * position * frequency), with YaRN's frequencies and magnitude (YaRN section 3.2).

    They lie between interpolated (slow dimensions) and untouched (fast ones).
    """
    width, yarn = config.qk_rope_head_dim, config.rope_scaling
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / config.rope_theta**exponents
    magnitude = 1.0
    if yarn is not None:
        # the dimensions that turn beta_fast and beta_slow times within the original context
        original, theta = yarn.original_max_position_embeddings, config.rope_theta
        fast, slow = (
            width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (yarn.beta_fast, yarn.beta_slow)
        )
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), width - 1)
        high_apart = high if high != low else high + 0.001
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high_apart - low)).clamp(0, 1)
        frequencies = frequencies * (1 - ramp) + frequencies / yarn.factor * ramp
        magnitude = _attention_temperature(yarn.factor, yarn.mscale or 1.0)
        if yarn.mscale and yarn.mscale_all_dim:
            magnitude /= _attention_temperature(yarn.factor, yarn.mscale_all_dim)
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), frequencies)
    return torch.polar(torch.full_like(angles, magnitude), angles)


class Rotary:
    """The table of rotations, complex64 [positions, R/2].

    Not a buffer: `model.bfloat16()` would round it, and checkpoints do not hold it.
    """

    def __init__(self, config: ModelConfig):
        self._config = config
        self._table: Tensor | None = None

    def table(self, device: torch.device) -> Tensor:
        if self._table is None or self._table.device != device:
            # autograd refuses inference-mode tensors
            with torch.inference_mode(False), torch.device("cpu"):
                self._table = _rotations(self._config).to(device)
        return self._table


def rotate(x: Tensor, rotation: Tensor, few: bool = False) -> Tensor:
    """Rotate the pairs (0,1), (2,3)... of x [..., R] by `rotation` [..., r] (broadcast), in float32.

    Pairs stay interleaved; transformers separates the two halves, which gives the same scores. `few`: as in
    kernels.usable.
    """
    if x.ndim == rotation.ndim == 3 and x.shape[1] == rotation.shape[1] and kernels.usable(x, few=few):
        return kernels.rotate(x, rotation)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)
