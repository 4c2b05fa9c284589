"""Prefill and decoding with the C++ kernels, several times faster on a CPU that can run them.

The arguments of kernels/cpu/forward.cpp are its structs in ctypes, with pointers to packed weights.
Axes as in layers.py; cache.py's Decoder is the reference.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import Structure, byref, c_double, c_int64, c_void_p
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from r1pipe.model.cache import Decoder, LatentCache, graph_decoder
from r1pipe.model.decoder_layer import DecoderLayer
from r1pipe.model.invariant import InvariantDecoder
from r1pipe.model.kernels.build import call, runs_here
from r1pipe.model.kernels.checks import ANY, check_even, check_floats, check_indices, check_tensor
from r1pipe.model.layers import SwiGLU
from r1pipe.model.mla import LATENT_EPS
from r1pipe.model.moe import MoE
from r1pipe.model.training import fp8_of
from r1pipe.model.transformer import DeepseekV3

PANEL = 64  # as in gemm.h


def _fields(words: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in words.split()]


class Shape(Structure):
    """The model's sizes and constants."""

    _fields_ = [
        *_fields("layers width heads nope rope value latent query_rank vocabulary", c_int64),
        *_fields("dense_layers dense_inner experts top_k groups open_groups inner shared_inner", c_int64),
        *_fields("group_best sigmoid normalise", c_int64),
        *_fields("eps latent_eps scale routed_scale", c_double),
    ]


class Layer(Structure):
    """Pointers to one layer's weights; null for those that it lacks."""

    _fields_ = [
        *_fields("attention_norm query_norm latent_norm mlp_norm gate bias", c_void_p),
        *_fields("first query up_key up_value out gate_up down shared_gate_up shared_down", c_void_p),
    ]


class Ends(Structure):
    """Pointers to the unpacked embedding, the last norm and the packed head."""

    _fields_ = _fields("embedding norm head", c_void_p)


class Batch(Structure):
    """N new tokens with their slots and positions, and pointers to the outputs: cache entries, logits and
    (or null) chosen experts."""

    _fields_ = [
        *_fields("tokens wanted", c_int64),
        *_fields("token slot position want cache", c_void_p),
        *_fields("layer_stride slot_stride entry_stride", c_int64),
        *_fields("rotation logits experts", c_void_p),
    ]


def pack(weight: Tensor) -> Tensor:
    """A weight [..., outputs, depth] as gemm.h's Packed: [..., outputs / 64 rounded up, depth, 64].

    In bfloat16, where `depth` must be even, pairs along the depth are adjacent: [..., depth / 2, 64, 2].
    """
    check_floats("weight", weight, dims=max(2, weight.ndim))
    *stack, outputs, depth = weight.shape
    pairs, panels = weight.dtype == torch.bfloat16, -(-outputs // PANEL)
    check_even(weight.dtype, depth=depth)
    shape = (*stack, panels, depth // 2, PANEL, 2) if pairs else (*stack, panels, depth, PANEL)
    packed = weight.new_empty(shape)
    call("pack", pairs, weight.contiguous(), math.prod(stack), outputs, depth, packed)
    return packed


def runs_natively(model: DeepseekV3) -> bool:
    """Whether the kernels run on this machine and support the model's device, type and widths.

    All weights must have the config's shapes and one type, and even depths in bfloat16.
    """
    config, dtype = model.config, model.lm_head.weight.dtype
    if model.lm_head.weight.device.type != "cpu" or not runs_here(dtype):
        return False
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in DeepseekV3(config).named_parameters()}
    if any(weight.shape != shapes[name] for name, weight in model.named_parameters()):
        return False
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    depths = [weight.shape[-1] for weight in weights] + [config.qk_nope_head_dim, config.kv_lora_rank]
    uniform = all(weight.dtype == dtype for weight in weights)
    return uniform and (dtype == torch.float32 or all(depth % 2 == 0 for depth in depths))


class NativeDecoder(Decoder):
    """Decoder with one kernel call per step; it holds a second, packed copy of the weights."""

    @torch.no_grad()
    def __init__(self, model: DeepseekV3):
        """Raises ValueError unless `runs_natively(model)`."""
        if not runs_natively(model):
            raise ValueError(
                "the CPU kernels do not run here, or not for this model's device, type and sizes"
            )
        super().__init__(model)
        self.dtype = model.lm_head.weight.dtype
        self._tensors: list[Tensor] = []  # keeps the memory alive that the pointers below point to
        config, trunk = model.config, model.model
        layers = [cast(DecoderLayer, layer) for layer in islice(trunk.layers, config.num_hidden_layers)]
        self.shape = self._shape(layers[0].self_attn.scale)
        self.layers = (Layer * len(layers))(*map(self._layer, layers))
        self.ends = Ends(
            self._pointer(trunk.embed_tokens.weight),
            self._float(trunk.norm.weight),
            self._packed(model.lm_head.weight),
        )
        self.rotation = torch.view_as_real(trunk.rotary.table(torch.device("cpu")))

    def _shape(self, scale: float) -> Shape:
        config = self.model.config
        steered = config.topk_method == "noaux_tc"
        return Shape(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
            query_rank=config.q_lora_rank or 0,
            vocabulary=config.vocab_size,
            dense_layers=config.first_k_dense_replace,
            dense_inner=config.intermediate_size,
            experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            groups=config.n_group,
            open_groups=config.n_group if config.topk_method == "greedy" else config.topk_group,
            inner=config.moe_intermediate_size,
            shared_inner=config.moe_intermediate_size * config.n_shared_experts,
            group_best=2 if steered else 1,
            sigmoid=config.scoring_func == "sigmoid",
            normalise=config.norm_topk_prob,
            eps=config.rms_norm_eps,
            latent_eps=LATENT_EPS,
            scale=scale,
            routed_scale=config.routed_scaling_factor,
        )

    def _layer(self, layer: DecoderLayer) -> Layer:
        mla, mlp, config = layer.self_attn, layer.mlp, self.model.config
        up_HnC = mla.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        up_k, up_v = up_HnC.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        pointers = Layer(
            attention_norm=self._float(layer.input_layernorm.weight),
            latent_norm=self._float(mla.kv_a_layernorm.weight),
            mlp_norm=self._float(layer.post_attention_layernorm.weight),
            up_key=self._packed(up_k.transpose(1, 2)),
            up_value=self._packed(up_v),
            out=self._packed(mla.o_proj.weight),
        )
        latent = mla.kv_a_proj_with_mqa.weight
        if config.q_lora_rank is None:
            pointers.first = self._packed(mla.q_proj.weight, latent)
        else:
            pointers.first = self._packed(mla.q_a_proj.weight, latent)
            pointers.query_norm = self._float(mla.q_a_layernorm.weight)
            pointers.query = self._packed(mla.q_b_proj.weight)
        if isinstance(mlp, MoE):
            pointers.gate = self._packed(mlp.gate.weight.float())
            if config.topk_method == "noaux_tc":
                pointers.bias = self._float(mlp.gate.e_score_correction_bias)
            pointers.gate_up = self._packed(mlp.experts.gate_up_proj)
            pointers.down = self._packed(mlp.experts.down_proj)
            if config.n_shared_experts:
                pointers.shared_gate_up, pointers.shared_down = self._swiglu(mlp.shared_experts)
        else:
            pointers.gate_up, pointers.down = self._swiglu(mlp)
        return pointers

    def _swiglu(self, mlp: SwiGLU) -> tuple[int, int]:
        return self._packed(mlp.gate_proj.weight, mlp.up_proj.weight), self._packed(mlp.down_proj.weight)

    def _packed(self, *weights: Tensor) -> int:
        """Weights joined along their rows, packed."""
        return self._pointer(pack(torch.cat(weights) if len(weights) > 1 else weights[0]))

    def _float(self, weight: Tensor) -> int:
        return self._pointer(weight.float())

    def _pointer(self, weight: Tensor) -> int:
        self._tensors.append(weight.contiguous())
        return self._tensors[-1].data_ptr()

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """As Decoder's; padding is not read, and its entries are zero."""
        rows, longest = tokens_BT.shape
        entries_LBTW = LatentCache(self.model, rows, longest).entries_LSMW
        real_BT = torch.arange(longest) < lengths_B.unsqueeze(1)
        rows_N, positions_N = real_BT.nonzero(as_tuple=True)
        last_B = lengths_B.cumsum(0) - 1
        logits_BV = self._run(tokens_BT[real_BT], rows_N, positions_N, entries_LBTW, last_B)
        if self._experts:  # in the last layer only the wanted tokens are left, and come first
            *before, last = self._experts
            self._experts[:] = [*(experts_NK[last_B] for experts_NK in before), last[:rows]]
        return entries_LBTW, logits_BV

    def decode(self, tokens_S: Tensor, positions_S: Tensor, cache: LatentCache, length: int) -> Tensor:
        """As Decoder's; `length` is ignored, as each slot reads only its own entries."""
        slots_S = torch.arange(len(tokens_S))
        return self._run(tokens_S, slots_S, positions_S, cache.entries_LSMW, slots_S)

    def _run(
        self, tokens_N: Tensor, slots_N: Tensor, positions_N: Tensor, entries_LSMW: Tensor, wanted: Tensor
    ) -> Tensor:
        """Read tokens_N at their slots and positions -> float32 logits of the `wanted` ones (ascending).

        Raises ValueError if they do not fit the cache, or the cache does not fit the model.
        """
        config, count = self.model.config, len(tokens_N)
        width = config.kv_lora_rank + config.qk_rope_head_dim
        check_tensor("cache", entries_LSMW, self.dtype, config.num_hidden_layers, ANY, ANY, width)
        _, slots, length, _ = entries_LSMW.shape
        if entries_LSMW.stride(3) != 1:
            raise ValueError("the numbers of a cache entry must be contiguous")
        check_indices("tokens", tokens_N, config.vocab_size, count)
        check_indices("slots", slots_N, slots, count)
        check_indices("positions", positions_N, min(length, len(self.rotation)), count)
        check_indices("wanted", wanted, count, ANY)
        indices = [index.contiguous() for index in (tokens_N, slots_N, positions_N, wanted)]
        logits = torch.empty(len(wanted), config.vocab_size)
        layer, slot, entry, _ = entries_LSMW.stride()
        batch = Batch(
            count,
            len(wanted),
            *(index.data_ptr() for index in indices),
            entries_LSMW.data_ptr(),
            *(layer, slot, entry),
            self.rotation.data_ptr(),
            logits.data_ptr(),
        )
        if self._experts is not None:
            layers = config.num_hidden_layers - config.first_k_dense_replace
            experts_LNK = torch.empty(layers, count, config.num_experts_per_tok, dtype=torch.int64)
            batch.experts = experts_LNK.data_ptr()
            self._experts += experts_LNK
        pairs = self.dtype == torch.bfloat16
        call("forward", pairs, byref(self.shape), self.layers, byref(self.ends), byref(batch))
        return logits

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """As Decoder's."""
        experts: list[Tensor] = []
        self._experts = experts
        try:
            yield experts
        finally:
            self._experts = None


def decoder_of(model: DeepseekV3, graphs: bool = False) -> Decoder:
    """The fastest decoder of the model with its current weights: training it further makes the decoder stale.

    `graphs` requests CUDA graphs. Raises ConfigError where they cannot run.
    """
    if fp8_of(model) is not None:  # sampling as in training; the config's rules refuse graphs
        return Decoder(model)
    if model.model.batch_invariant:
        return InvariantDecoder(model)
    if graphs:
        return graph_decoder(model)
    return NativeDecoder(model) if runs_natively(model) else Decoder(model)
