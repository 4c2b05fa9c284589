"""What the fast paths must not cost: whole logits in memory, or another result in bfloat16."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from shapes import ours, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from r1pipe.core.types import Completion
from r1pipe.data.packing import Batch
from r1pipe.model import logprobs
from r1pipe.model.kernels import training as kernels
from r1pipe.model.moe import Experts
from r1pipe.train.rl.batch import Rollout, collate
from r1pipe.train.rl.update import Reference, completion_logprobs
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.sft.loop import loss_sums, read

WIDE = tiny(vocab_size=4096, num_hidden_layers=2)


class WidestLogits(TorchDispatchMode):
    """Remembers the most numbers in a tensor whose rows are over the vocabulary."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            logits = isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == WIDE.vocab_size
            if logits and tensor.shape[0] != WIDE.hidden_size:  # the transposed head is no logits
                self.most = max(self.most, tensor.numel())
        return out


def training(model) -> None:
    rows = tokens(4, 128, WIDE)
    batch = Batch(rows, torch.ones_like(rows), torch.ones_like(rows).bool())
    loss, _ = loss_sums(model, batch, *read(model, batch, with_balance=False), with_mtp=False)
    loss.backward()


def rollouts() -> list[Rollout]:
    rows = tokens(8, 80, WIDE).tolist()
    return [Rollout(row[:16], Completion(row[16:], [-1.0] * 64, "stop"), 1.0, True) for row in rows]


def policy(model) -> None:
    batch = collate(rollouts(), [1.0] * 8, 0.0, torch.device("cpu"))
    completion_logprobs(model, batch, 0.7).sum().backward()


def reference(model) -> None:
    from jobs import engine_config

    micro = collate(rollouts(), [1.0] * 8, 0.0, torch.device("cpu"))
    Reference(deepcopy(model), engine_config()).logprobs([micro], 1.0)


def sampling(model) -> None:
    prompts = [row[:100] for row in tokens(8, 128, WIDE).tolist()]
    Batcher(model.eval(), 1, 0, max_num_seqs=8).generate(prompts, SamplingParams(max_tokens=3))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("path", [training, policy, reference, sampling])
def test_the_logits_of_a_long_batch_are_never_whole_in_memory(path: Callable, compiled: bool, monkeypatch):
    rows = 48
    if not compiled:
        monkeypatch.setattr(kernels, "usable", lambda *given, **few: False)
    monkeypatch.setattr(logprobs, "LOGITS_IN_MEMORY", rows * WIDE.vocab_size)
    monkeypatch.setattr(kernels, "LOGITS", rows * WIDE.vocab_size)
    with WidestLogits() as seen:
        path(ours(WIDE))
    assert seen.most <= rows * WIDE.vocab_size
    assert seen.most > 0 or compiled  # the kernels keep what is no gradient out of torch's sight


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_experts_compute_what_float32_experts_do(compiled: bool, monkeypatch):
    """The filling of their groups changes nothing but the rounding, forward and backward."""
    if not compiled:
        monkeypatch.setattr(kernels, "usable", lambda *given, **few: False)
    config = replace(WIDE, n_routed_experts=8, num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    experts = Experts(config)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(0.1 * normal(*weight.shape))
    x_ND, weights_NK, out_ND = normal(50, config.hidden_size), normal(50, 2).abs(), normal(50, 64)
    experts_NK = torch.rand(50, 7, generator=generator).topk(2).indices  # the eighth expert gets none
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x = x_ND.to(dtype, copy=True).requires_grad_()
        own = Experts(config).to(dtype)
        own.load_state_dict(experts.state_dict())
        out = own(x, weights_NK, experts_NK)
        out.backward(out_ND.to(dtype))
        found.append([out, x.grad, *(p.grad for p in own.parameters())])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded.float()).norm() < 0.02 * exact.norm()
