"""The head: its type, its chunks, and ranks that have other numbers of them."""

from dataclasses import replace

import pytest
import torch
from hf_models import write_model
from jobs import OPTIM, ROUTER, engine_config, on_two_ranks, tiny, tiny_model
from rl_runs import rollout_of
from tiny_runs import tiny_config
from torch import Tensor, nn

from r1pipe.config import RLConfig
from r1pipe.core.types import Completion
from r1pipe.model import DeepseekV3, load_pretrained, logprobs, native
from r1pipe.model.kernels import training as kernels
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.logprobs import Head
from r1pipe.model.training import set_precision
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.batch import collate
from r1pipe.train.rl.update import completion_logprobs, update
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

# wide enough that ZeRO-3 partitions the head
SHAPE = replace(tiny("pretrain").model, hidden_size=256, vocab_size=512)
HIDDEN = torch.randint(0, 512, (1, 8), generator=torch.Generator().manual_seed(1))


def model() -> DeepseekV3:
    return DeepseekV3(SHAPE, torch.Generator().manual_seed(0))


def targets(count: int) -> Tensor:
    return torch.arange(count) * 7 % SHAPE.vocab_size


# the first of two ranks has the long ones, which take a micro-batch each
ROLLOUTS = [
    rollout_of([1, n], [*range(7, 7 + length)], [-5.5] * length, 1.0) for n, length in enumerate((8, 1, 7, 1))
]


def corrected() -> RLConfig:
    words = ("stage.minibatches=1", "stage.importance_cap=1.1", "stage.max_tokens_per_micro_batch=12")
    return tiny_config("stage=grpo", *words).stage


def test_ranks_with_other_numbers_of_chunks_train_as_one(tmp_path):
    """Each call of a module gathers its weights under ZeRO-3, so that a call per chunk would hang."""
    found = on_two_ranks("two_ranks_head.py", tmp_path)
    engine = Engine(model(), OPTIM, ROUTER, engine_config(), total_steps=10)

    def loss() -> Tensor:
        head, tokens = engine.module.lm_head, [HIDDEN, HIDDEN[:, :3]]
        shares = [head(engine.module.hidden(t).flatten(0, 1), targets(t.shape[1])).sum() for t in tokens]
        return -torch.stack(shares).sum() / 11

    stats = [engine.train_step([loss]) for _ in range(2)]
    metrics = update(engine, ROLLOUTS, corrected(), None)
    corrections = [
        metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("mean", "max", "capped")
    ]
    alone = [*([one.loss, one.grad_norm] for one in stats), corrections]
    expected = {"fp32": alone, "bf16": found["2 bf16"]}
    for name, rows in found.items():
        for row, one in zip(rows, expected[name.split()[1]], strict=True):
            assert row == pytest.approx(one, rel=1e-4), name


# --- its type

EXACT = 1e-5  # of logits around 1


def bfloat16_head(fp32: bool, bias: bool = False) -> Head:
    torch.manual_seed(2)
    head = Head.sharing(nn.Linear(64, 98, bias).bfloat16())
    head.fp32 = fp32
    return head


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_logits_in_float32_are_those_of_the_same_weights_in_float64(shape, bias):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    head = bfloat16_head(True, bias)
    exact = x.double() @ head.weight.double().t() + (head.bias.double() if bias else 0.0)
    found = head(x)
    head.fp32 = False
    rounded = head(x)
    assert (found.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (found - exact).abs().max() < EXACT < (rounded - exact).abs().max() / 10
    # the gradients are those of a plain head: products of bfloat16
    slopes, plain = (
        torch.autograd.grad(logits.float().square().sum(), [x, head.weight]) for logits in (found, rounded)
    )
    for one, other in zip(slopes, plain, strict=True):
        assert (one - other).float().norm() < 0.01 * other.float().norm()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_path_of_float32_log_probabilities_is_the_same(temperature, monkeypatch):
    """In chunks, whole, and by the CPU kernels, which have float32 logits of themselves and are for the
    bundled model's head alone."""
    x_ND = torch.randn(300, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    targets_N = torch.arange(300) % 98
    head, own = bfloat16_head(True), Head(64, 98)
    own.weight, own.fp32 = head.weight, True
    exact_NV = (x_ND.double() @ head.weight.double().t() / temperature).log_softmax(-1)
    exact_N = exact_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    found = [own(x_ND, targets_N, temperature)]
    monkeypatch.setattr(kernels, "logprobs", None)
    assert kernels.usable(x_ND, 98) or not runs_here(torch.bfloat16)
    found.append(head(x_ND, targets_N, temperature))
    monkeypatch.setattr(kernels, "usable", lambda *given, **few: False)
    found.append(own(x_ND, targets_N, temperature))
    monkeypatch.setattr(logprobs, "LOGITS_IN_MEMORY", 70 * 98)
    found.append(head(x_ND, targets_N, temperature))
    for found_N in found:
        assert (found_N - exact_N).abs().max() < EXACT
    head.fp32 = False
    assert (head(x_ND, targets_N, temperature) - exact_N).abs().max() > 100 * EXACT


def gap(policy, engine) -> float:
    """Mean distance, in nats, of the trainer's log-probabilities from the sampler's."""
    set_precision(policy, engine, torch.device("cpu"))
    prompts = [[1, 5, 6], [1, 9, 9, 4]]
    params = SamplingParams(max_tokens=24, n=32, seed=1, ignore_eos=True)
    drawn: list[Completion] = Batcher(policy, 1, 0).generate(prompts, params)
    rollouts = [rollout_of(prompts[i // 32], c.tokens, c.logprobs) for i, c in enumerate(drawn)]
    micro = collate(rollouts, None, 0.0, torch.device("cpu"))
    with torch.no_grad():
        found_N = completion_logprobs(policy, micro, 1.0)
    return float((found_N - micro.old_N).abs().mean())


@pytest.mark.parametrize("kind", ["bundled", "hf"])
def test_a_float32_head_brings_sampler_and_trainer_closer_in_bfloat16(kind, tmp_path, monkeypatch):
    if kind == "bundled":
        monkeypatch.setattr(kernels, "usable", lambda *given, **few: False)
        monkeypatch.setattr(native, "runs_natively", lambda model: False)
        policy = tiny_model().bfloat16()
        with torch.no_grad():  # initial weights give logits of nearly 0
            policy.lm_head.weight.mul_(20)
    else:
        policy = load_pretrained(write_model(tmp_path / "hf", "qwen3", torch.bfloat16))
    apart = {head: gap(policy, engine_config(1, 1, "bf16", head)) for head in ("model", "fp32")}
    assert 0 < apart["fp32"] < 0.95 * apart["model"], apart
