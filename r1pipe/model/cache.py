"""Decoding on the latent cache, which holds each token's latent and one rotated key: C+R numbers.

A step may go through CUDA graphs: one call launches its hundreds of small kernels, whose launches one by one
from Python take longer than their computation for one token per slot.
Axes as in layers.py; M is the cache's length, W = C+R the width of an entry.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from r1pipe.core.errors import ConfigError
from r1pipe.model.decoder_layer import DecoderLayer
from r1pipe.model.moe import gates
from r1pipe.model.transformer import DeepseekV3

LENGTHS = 128  # cache lengths are rounded up to a multiple: one capture serves as many steps of a full batch
GROUPED = (9, 10)  # major compute capabilities whose grouped matmul keeps the groups' sizes on the GPU

# Captures a step: returns a function that replays it on the same tensors, and the tensor that it fills.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


class LatentCache:
    """Entries of `slots` sequences of up to `length` tokens: entries_LSMW, latent then rotated key."""

    def __init__(self, model: DeepseekV3, slots: int, length: int):
        config, weight = model.config, model.lm_head.weight
        width = config.kv_lora_rank + config.qk_rope_head_dim
        # zeros, not empty: attention gives masked places weight 0, and 0 times NaN is NaN
        self.entries_LSMW = torch.zeros(
            config.num_hidden_layers, slots, length, width, dtype=weight.dtype, device=weight.device
        )

    @property
    def length(self) -> int:
        return self.entries_LSMW.shape[2]

    def fill(self, slots: Tensor, entries_LBTW: Tensor, rows: Tensor) -> None:
        """Copy prompt rows[i] into slots[i]."""
        self.entries_LSMW[:, slots, : entries_LBTW.shape[2]] = entries_LBTW.index_select(1, rows)

    def move(self, slots: Tensor, to: Tensor, length: int) -> None:
        """Copy the first `length` entries of `slots` to the slots `to`."""
        self.entries_LSMW[:, to, :length] = self.entries_LSMW[:, slots, :length]

    def grow(self, length: int) -> None:
        layers, slots, held, width = self.entries_LSMW.shape
        more_LSMW = self.entries_LSMW.new_zeros(layers, slots, length - held, width)
        self.entries_LSMW = torch.cat([self.entries_LSMW, more_LSMW], dim=2)

    def widen(self, slots: int) -> None:
        layers, held, length, width = self.entries_LSMW.shape
        more_LSMW = self.entries_LSMW.new_zeros(layers, slots - held, length, width)
        self.entries_LSMW = torch.cat([self.entries_LSMW, more_LSMW], dim=1)

    def shrink(self, slots: int) -> None:
        self.entries_LSMW = self.entries_LSMW[:, :slots]


class Decoder:
    """Runs a model on the cache with torch's operators, on any device."""

    # (logits_SV, tokens_S) -> log-probabilities as the trainer sums them; None: as the sampler's softmax does
    logprobs_of: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, model: DeepseekV3):
        self.model = model
        self._experts: list[Tensor] | None = None  # where `recorded` collects

    def slots_for(self, live: int, slots: int) -> int:
        """How many of `slots` to keep while `live` are unfinished."""
        return live

    def cache(self, slots: int, length: int) -> LatentCache:
        return LatentCache(self.model, slots, length)

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Collects the experts of each MoE layer in turn while the context is open: [S, K] in `decode`, and
        [B, K], of each prompt's last token, in `prefill`."""
        experts: list[Tensor] = []
        hooks = [
            gate.register_forward_hook(lambda gate, inputs, outputs: experts.append(outputs[1]))
            for gate in gates(self.model)
        ]
        self._experts = experts
        try:
            yield experts
        finally:
            self._experts = None
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Read prompts padded on the right -> cache entries_LBTW and the logits_BV after each last token."""
        entries: list[Tensor] = []
        hidden_BTD = self.model.model(tokens_BT, keep=entries.append)
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        last_BD = hidden_BTD[rows_B, lengths_B - 1]
        self._keep_last(tokens_BT.shape, lengths_B)
        return torch.stack(entries), self.model.lm_head(last_BD)

    def _keep_last(self, shape: torch.Size, lengths_B: Tensor) -> None:
        """Of the recorded experts of prompts [B*T, K], those of each prompt's last token."""
        if self._experts is not None:
            last_B = torch.arange(len(lengths_B), device=lengths_B.device) * shape[1] + lengths_B - 1
            self._experts[:] = [experts_NK[last_B] for experts_NK in self._experts]

    @torch.no_grad()
    def decode(self, tokens_S: Tensor, positions_S: Tensor, cache: LatentCache, length: int) -> Tensor:
        """Read one more token per slot, at `positions_S` -> logits_SV; the cache grows by these tokens.

        `length`, the part of the cache that is read, is larger than the position of every live slot. Finished
        slots may be beyond it; their logits are meaningless.
        """
        trunk = self.model.model
        rotation_Sr = trunk.rotary.table(tokens_S.device).index_select(0, positions_S)
        places_M = torch.arange(length, device=tokens_S.device)
        x_SD = trunk.embed_tokens(tokens_S)
        unseen_SM = torch.where(places_M <= positions_S.unsqueeze(1), 0.0, float("-inf")).to(x_SD.dtype)
        firsts_S = torch.arange(0, len(tokens_S) * cache.length, cache.length, device=tokens_S.device)
        for layer, entries_SMW in zip(trunk.layers, cache.entries_LSMW, strict=False):  # MTP layers come last
            x_SD = cast(DecoderLayer, layer).decode(
                x_SD, rotation_Sr, firsts_S + positions_S, entries_SMW, unseen_SM
            )
        return self.model.lm_head(trunk.norm(x_SD))


class GraphDecoder(Decoder):
    """Decoder whose steps are captured once for each number of slots and rounded-up cache length.

    Use it for one `generate`: a graph holds the addresses of cache and weights, which may change in the next
    (ZeRO-3 gathers weights again). A capture costs about two plain steps, and one generate needs few: one per
    halving of the slots and one per LENGTHS tokens.
    """

    def __init__(self, model: DeepseekV3, capture: Capture):
        super().__init__(model)
        self._capture = capture
        # the tensors that a captured step reads (tokens and positions), its replay, and those that it fills:
        # the logits and, where they are recorded, experts_LSK
        self._steps: dict[
            tuple[int, ...], tuple[Tensor, Tensor, Callable[[], object], Tensor, Tensor | None]
        ] = {}

    def slots_for(self, live: int, slots: int) -> int:
        """Only halves: each number of slots needs its own capture, and idle slots cost little."""
        while slots >= 2 * live:
            slots //= 2
        return slots

    @torch.no_grad()
    def decode(self, tokens_S: Tensor, positions_S: Tensor, cache: LatentCache, length: int) -> Tensor:
        """As Decoder's. The logits are overwritten by the next call."""
        length = min(-(-length // LENGTHS) * LENGTHS, cache.length)  # entries beyond a position are masked
        key = (
            *(cache.entries_LSMW.data_ptr(), cache.length, len(tokens_S), length),
            self._experts is not None,
        )
        if key not in self._steps:
            inputs, into_LSK = (tokens_S.clone(), positions_S.clone()), self._buffer(len(tokens_S))
            step = partial(self._plain_step, *inputs, cache, length, into_LSK)
            self._steps[key] = (*inputs, *self._capture(step), into_LSK)
        read_tokens_S, read_positions_S, replay, logits_SV, experts_LSK = self._steps[key]
        read_tokens_S.copy_(tokens_S)
        read_positions_S.copy_(positions_S)
        replay()
        if self._experts is not None and experts_LSK is not None:
            self._experts[:] = experts_LSK.clone().unbind()
        return logits_SV

    def _buffer(self, slots: int) -> Tensor | None:
        """Where a captured step puts its experts_LSK; None while none are recorded."""
        if self._experts is None:
            return None
        config, device = self.model.config, self.model.lm_head.weight.device
        shape = len(gates(self.model)), slots, config.num_experts_per_tok
        return torch.empty(shape, dtype=torch.int64, device=device)

    def _plain_step(
        self, tokens_S: Tensor, positions_S: Tensor, cache: LatentCache, length: int, into_LSK: Tensor | None
    ) -> Tensor:
        logits_SV = super().decode(tokens_S, positions_S, cache, length)
        if into_LSK is not None and self._experts is not None:
            into_LSK.copy_(torch.stack(self._experts[-len(into_LSK) :]))
        return logits_SV


def graph_decoder(model: DeepseekV3) -> GraphDecoder:
    """Raises ConfigError where a step would copy numbers from the GPU, which cannot be captured."""
    weight = model.lm_head.weight
    if weight.device.type != "cuda":
        raise ConfigError(f"engine.graphs=true needs a GPU; this model is on the {weight.device.type}")
    major, minor = torch.cuda.get_device_capability(weight.device)
    if major not in GROUPED or weight.dtype != torch.bfloat16:
        raise ConfigError(
            "engine.graphs=true needs bfloat16 weights and a GPU of compute capability 9 or 10, where experts"
            f" are one matmul; here weights are {weight.dtype} and the capability is {major}.{minor}"
        )
    pool = torch.cuda.graph_pool_handle()
    return GraphDecoder(model, partial(_capture, pool=pool))


def _capture(step: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], object], Tensor]:
    """The step as a graph in the graphs' common memory, as each result is used before the next graph runs.

    As in https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: a warm-up run on another stream,
    which initialises libraries, then the capture, which computes nothing.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits_SV = step()
    return graph.replay, logits_SV
