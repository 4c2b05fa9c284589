"""The compiled kernels of training passes against the torch code in their place, forward and backward."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from jobs import OPTIM, ROUTER, engine_config
from shapes import SHAPES, V2_SHAPES, ours, tiny, tokens
from torch import Tensor

from r1pipe.model import DeepseekV3
from r1pipe.model.kernels import training as kernels
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.layers import SwiGLU
from r1pipe.model.moe import Balance
from r1pipe.model.native import NativeDecoder
from r1pipe.train.engine.engine import Engine

ALIKE = {torch.float32: 1e-5, torch.bfloat16: 0.04}  # ||a - b|| / ||b||; bfloat16: of whole models
pytestmark = pytest.mark.skipif(not runs_here(torch.float32), reason="the CPU kernels do not run here")
TYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not runs_here(torch.bfloat16), reason="no products of bfloat16 here"),
    ),
]


def results(model: torch.nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """What `run` gives, and the gradients of the model's parameters."""
    model.zero_grad()
    out = run()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) / out.numel() ** 0.5
    (out.float() * weight).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def apart(model: torch.nn.Module, run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest relative difference between the kernels' results and torch's."""
    mine = results(model, run)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "usable", lambda *given, **few: False)
        reference = results(model, run)
    assert len(mine) == len(reference)
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(mine, reference, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SHAPES | V2_SHAPES)
def test_a_model_computes_what_torch_does(name, dtype, monkeypatch):
    config = (SHAPES | V2_SHAPES)[name]
    rows = tokens(3, 75, config)
    documents = torch.tensor([1] * 20 + [2] * 33 + [0] * 22).expand(3, 75)
    if dtype == torch.bfloat16:  # of routing, rounding decides: here all experts are chosen
        config = tiny(n_routed_experts=4, n_group=1, topk_group=1, vocab_size=98)
    model = ours(config).to(dtype)
    for segments in (None, documents):
        run = lambda segments=segments: model(rows, segments)  # noqa: E731
        assert apart(model, run, monkeypatch) < ALIKE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_after_a_prompt_compute_what_torch_does(dtype, monkeypatch):
    model = ours(tiny(n_routed_experts=4, n_group=1, topk_group=1)).to(dtype)
    prompts, rows = tokens(2, 9, model.config), tokens(6, 70, model.config)
    lengths, prompt_of = torch.tensor([9, 5]), torch.tensor([0, 0, 0, 1, 1, 1])
    balances = (Balance.of_lengths(lengths, 9, False), Balance.of_lengths(torch.full((6,), 70), 70, False))

    def run() -> Tensor:
        return model.model.after_prompts(prompts, lengths, rows, prompt_of, balances)

    assert apart(model, run, monkeypatch) < ALIKE[dtype]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("count", [1, 16, 333])
def test_logprobs_in_several_chunks(count, temperature, monkeypatch):
    model = ours(tiny())
    hidden_ND = torch.randn(count, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets_N = tokens(1, count, model.config)[0]
    monkeypatch.setattr(kernels, "LOGITS", 100 * 97)

    def run() -> Tensor:
        return model.lm_head(hidden_ND, targets_N, temperature)

    assert apart(model.lm_head, run, monkeypatch) < ALIKE[torch.float32]


@pytest.mark.parametrize("dtype", TYPES)
def test_threads_change_no_bit_from_one_run_to_the_next(dtype):
    model = ours(tiny(vocab_size=98)).to(dtype)
    rows = tokens(4, 200, model.config)
    first, second = (results(model, lambda: model(rows)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_callers_in_several_threads_change_no_bit():
    model = ours(tiny(vocab_size=98))
    rows = tokens(40, 70, model.config)

    def logits(_: object = None) -> bytes:
        _, found = NativeDecoder(model).prefill(rows, torch.full((40,), 70))
        return found.numpy().tobytes()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(2) as pool:
            assert set(pool.map(logits, range(4))) == {logits()}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    layer = SwiGLU(64, 96)
    for part in (layer.gate_proj, layer.down_proj):
        x = torch.randn(20, 64)
        with torch.no_grad():
            part.weight[3, 2] = value
        assert not layer(x).isfinite().all()
        with torch.no_grad():
            part.weight[3, 2] = 0.0
    x[5, 7] = value
    out = layer(x)
    assert not out[5].isfinite().any() and out[:5].isfinite().all() and out[6:].isfinite().all()


def test_odd_widths_in_bfloat16_few_rows_and_other_types_are_left_to_torch():
    x = torch.ones(4, 6)
    assert kernels.usable(x, 7) and not kernels.usable(x.bfloat16(), 7) and not kernels.usable(x.double(), 6)
    with torch.no_grad():
        assert not kernels.usable(x, 6) and kernels.usable(torch.ones(kernels.WORTHWHILE, 6), 6)


def test_weights_that_zero_3_partitions_are_there_when_a_kernel_reads_them():
    """A SwiGLU reads its parts' weights without calling the parts; DeepSpeed leaves small weights whole."""
    config = tiny(hidden_size=256, intermediate_size=512, vocab_size=512)
    rows = tokens(2, 33, config)

    def stats_at(level: int) -> list[tuple[float, float]]:
        engine = Engine(DeepseekV3(config), OPTIM, ROUTER, engine_config(1, level), total_steps=10)
        weight = engine.module.model.layers[0].mlp.gate_proj.weight
        assert (weight.numel() == 0) == (level == 3)

        def loss() -> Tensor:
            hidden_ND = engine.module.hidden(rows[:, :-1]).flatten(0, 1)
            targets_N = rows[:, 1:].flatten()
            return -engine.module.lm_head(hidden_ND, targets_N).mean()

        steps = [engine.train_step([loss, loss]) for _ in range(2)]
        return [(step.loss, step.grad_norm) for step in steps]

    for whole, partitioned in zip(stats_at(0), stats_at(3), strict=True):
        assert partitioned == pytest.approx(whole, rel=1e-4)


def test_no_learned_token_gives_no_gradient():
    """The head's memory still holds the sums of the call before."""
    model = ours(tiny())
    for count in (20, 0):
        model.zero_grad()
        hidden_ND = torch.ones(count, 64, requires_grad=True)
        targets_N = torch.zeros(count, dtype=torch.long)
        model.lm_head(hidden_ND, targets_N).sum().backward()
    assert model.lm_head.weight.grad is None or not model.lm_head.weight.grad.any()


def test_without_shared_experts(monkeypatch):
    model = ours(tiny(n_shared_experts=0, vocab_size=98))
    rows = tokens(2, 40, model.config)
    mine = model(rows)
    monkeypatch.setattr(kernels, "usable", lambda *given, **few: False)
    torch.testing.assert_close(mine, model(rows), atol=1e-4, rtol=0)


def test_weights_of_another_type_are_refused():
    layer = SwiGLU(64, 96)
    layer.up_proj.bfloat16()
    with pytest.raises(
        ValueError, match=r"up must be torch.float32 \[96, 64\] on the CPU, not torch.bfloat16"
    ):
        layer(torch.ones(3, 64))
