"""Decoding through CUDA graphs: one call launches a step's hundreds of small kernels.

Launching them one by one from Python takes longer than their computation for one token per slot.
Axes as in layers.py; cache.py's Decoder is the reference.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from r1pipe.core.errors import ConfigError
from r1pipe.model.cache import Decoder, LatentCache
from r1pipe.model.transformer import DeepseekV3

LENGTHS = 128  # cache lengths are rounded up to a multiple: one capture serves as many steps of a full batch
GROUPED = (9, 10)  # major compute capabilities whose grouped matmul keeps the groups' sizes on the GPU

# Captures a step: returns a function that replays it on the same tensors, and the tensor that it fills.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


class GraphDecoder(Decoder):
    """Decoder whose steps are captured once for each number of slots and rounded-up cache length.

    Use it for one `generate`: a graph holds the addresses of cache and weights, which may change in the next
    (ZeRO-3 gathers weights again). A capture costs about two plain steps, and one generate needs few: one per
    halving of the slots and one per LENGTHS tokens.
    """

    def __init__(self, model: DeepseekV3, capture: Capture):
        super().__init__(model)
        self._capture = capture
        # the tensors that a captured step reads (tokens and positions), its replay, and the logits it fills
        self._steps: dict[tuple[int, ...], tuple[Tensor, Tensor, Callable[[], object], Tensor]] = {}

    def slots_for(self, live: int, slots: int) -> int:
        """Only halves: each number of slots needs its own capture, and idle slots cost little."""
        while slots >= 2 * live:
            slots //= 2
        return slots

    @torch.no_grad()
    def decode(self, tokens_S: Tensor, positions_S: Tensor, cache: LatentCache, length: int) -> Tensor:
        """As Decoder's. The logits are overwritten by the next call."""
        length = min(-(-length // LENGTHS) * LENGTHS, cache.length)  # entries beyond a position are masked
        key = (cache.entries_LSMW.data_ptr(), cache.length, len(tokens_S), length)
        if key not in self._steps:
            inputs = tokens_S.clone(), positions_S.clone()
            plain_step = partial(super().decode, *inputs, cache, length)
            self._steps[key] = (*inputs, *self._capture(plain_step))
        read_tokens_S, read_positions_S, replay, logits_SV = self._steps[key]
        read_tokens_S.copy_(tokens_S)
        read_positions_S.copy_(positions_S)
        replay()
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
    return GraphDecoder(model, cuda_capture())


def cuda_capture() -> Capture:
    """Captures into graphs that share their memory, as each result is used before the next graph runs.

    As in https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: a warm-up run on another stream,
    which initialises libraries, then the capture, which computes nothing.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits_SV = step()
        return graph.replay, logits_SV

    return capture
