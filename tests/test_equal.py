"""engine.equal=true: the sampler's log-probabilities are the trainer's, to the bit."""

from dataclasses import replace

import pytest
import torch
from jobs import engine_config
from rl_runs import go, metrics_of
from shapes import SHAPES, V2_SHAPES, ours, tiny, tokens
from tiny_runs import tiny_run

from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.model import DeepseekV3, set_recompute, training
from r1pipe.model.cache import Decoder, LatentCache
from r1pipe.model.invariant import InvariantDecoder
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.native import decoder_of
from r1pipe.model.training import set_batch_invariant
from r1pipe.train.rl.batch import Rollout, collate
from r1pipe.train.rl.update import completion_logprobs
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

needs_kernels = pytest.mark.skipif(not runs_here(torch.float32), reason="the CPU kernels do not run here")
needs_bfloat16 = pytest.mark.skipif(not runs_here(torch.bfloat16), reason="no products of bfloat16 here")
PROMPTS = [[5], tokens(1, 60, tiny())[0].tolist(), [9, 8, 7, 6]]  # beside a tile of 64 keys, and beyond it
CONFIGS = {
    "v3": SHAPES["v3"],
    "yarn": SHAPES["yarn_mscale"],
    "v2": V2_SHAPES["v2"],
    "odd": tiny(hidden_size=68, kv_lora_rank=34, qk_nope_head_dim=14, qk_rope_head_dim=6, v_head_dim=10,
                moe_intermediate_size=20, intermediate_size=50, n_routed_experts=6, n_group=3, topk_group=2,
                num_experts_per_tok=3, q_lora_rank=18, num_attention_heads=3, vocab_size=98),
}  # fmt: skip


def model_of(name: str, dtype: torch.dtype) -> DeepseekV3:
    config = replace(CONFIGS[name], vocab_size=98)
    model = ours(config).to(dtype)
    set_batch_invariant(model, True, dtype)
    return model


def drawn(model: DeepseekV3, slots: int, temperature: float) -> list[Rollout]:
    """Three ragged completions of each prompt: slots are refilled and dropped as they end."""
    params = SamplingParams(16, temperature, n=3, seed=2, stop_token_ids=tuple(range(3, 15)))
    completions = Batcher(model.eval(), (), 0, slots).generate(PROMPTS, params)
    return [Rollout(PROMPTS[i // 3], completion, 0.0, True) for i, completion in enumerate(completions)]


@needs_kernels
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("v3", torch.float32),
        ("yarn", torch.float32),
        pytest.param("v3", torch.bfloat16, marks=needs_bfloat16),
        pytest.param("yarn", torch.bfloat16, marks=needs_bfloat16),
        ("v2", torch.float32),
        ("odd", torch.float32),
        pytest.param("odd", torch.bfloat16, marks=needs_bfloat16),
    ],
)
def test_to_the_bit_whatever_the_batches_are(name, dtype):
    """However many slots decode together, and however the trainer packs rows; with and without gradient."""
    model = model_of(name, dtype)
    rows = drawn(model, 5, 0.9)
    assert len({len(row.completion.tokens) for row in rows}) > 2, "completions must be ragged"
    old = [torch.tensor(row.completion.logprobs) for row in rows]
    for packed in ([[*range(9)]], [[3, 7], [0, 1, 2, 4, 5, 6, 8]], [[0], [8]]):
        for some in packed:
            micro = collate([rows[n] for n in some], None, 0.0, torch.device("cpu"))
            trained_N = completion_logprobs(model.train(), micro, 0.9)
            assert trained_N.requires_grad
            assert torch.equal(trained_N, torch.cat([old[n] for n in some]))
            with torch.no_grad():
                assert torch.equal(completion_logprobs(model, micro, 0.9), trained_N)


@needs_bfloat16
def test_without_the_mode_they_differ():
    model = model_of("v3", torch.bfloat16)
    set_batch_invariant(model, False)
    rows = drawn(model, 5, 1.0)
    micro = collate(rows, None, 0.0, torch.device("cpu"))
    gap_N = completion_logprobs(model, micro, 1.0) - micro.old_N
    assert gap_N.abs().max() > 1e-3


@needs_kernels
def test_slots_threads_and_recomputation_change_no_bit():
    model = model_of("v3", torch.float32)
    found, threads = [], torch.get_num_threads()
    for slots, count in ((2, 1), (9, 3)):
        torch.set_num_threads(count)
        found.append([(r.completion.tokens, r.completion.logprobs) for r in drawn(model, slots, 1.0)])
        set_recompute(model.train(), count == 3)
        micro = collate(drawn(model, slots, 1.0), None, 0.0, torch.device("cpu"))
        model.train()
        assert torch.equal(completion_logprobs(model, micro, 1.0), micro.old_N)
    torch.set_num_threads(threads)
    assert found[0] == found[1]


@needs_kernels
def test_it_is_the_model_of_torchs_operators():
    """The slow reference of all decoders, within rounding."""
    model, text = model_of("v3", torch.float32), tokens(4, 30, CONFIGS["v3"])
    lengths = torch.tensor([3, 9, 1, 6])
    found = []
    for kind in (InvariantDecoder, Decoder):
        set_batch_invariant(model, kind is InvariantDecoder)
        decoder, cache, rows = kind(model), LatentCache(model, 4, 30), torch.arange(4)
        entries, logits = decoder.prefill(text[:, :9], lengths)
        cache.fill(rows, entries, rows)
        steps = [logits]
        for step in range(8):
            at = lengths + step
            steps.append(decoder.decode(text[rows, at], at, cache, int(at.max()) + 1).clone())
        found.append(torch.stack(steps))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bfloat16)])
def test_a_run_measures_zero(precision, tmp_path):
    words = ["stage=grpo", "stage.max_steps=2", "stage.sampling.max_tokens=12", "stage.minibatches=1"]
    words += [f"engine.precision={precision}", "engine.zero_level=1", "engine.equal=true"]
    folder = tiny_run(tmp_path / "equal", *words)
    go(folder)
    for row in metrics_of(folder):
        assert row["sampling/sampling_logp_difference/max"] == 0
        assert row["importance_ratio/min"] == row["importance_ratio/max"] == 1


def test_what_cannot_run_is_refused(monkeypatch):
    for words, said in (
        ("engine.precision=fp8 engine.zero_level=1", "engine.precision=fp32 or bf16"),
        ("engine.sampler_precision=bf16", "engine.sampler_precision=same"),
        ("engine.sampler=transformers", "is for engine.sampler=bundled"),
        ("engine.async_steps=1", "engine.async_steps=0"),
        ("engine.precision=bf16 engine.zero_level=1 model.v_head_dim=31", "even widths"),
        ("engine.accelerator=cuda", "engine.accelerator=cpu"),
    ):
        with pytest.raises(ConfigError, match=said):
            compose(["stage=grpo", "recipe=laptop", "engine.equal=true", *words.split()])
    monkeypatch.setattr(training, "runs_here", lambda dtype: False)
    with pytest.raises(EnvironmentProblem, match="needs the CPU kernels"):
        set_batch_invariant(ours(SHAPES["v3"]), True)
    assert engine_config().equal is False


@needs_kernels
def test_a_pass_that_would_leave_the_kernels_is_refused():
    model = ours(SHAPES["v3"])
    set_batch_invariant(model, True)
    with pytest.raises(ConfigError, match=r"engine\.equal=true: the CPU kernels cannot compute"):
        model.double()(torch.tensor([[5, 6]]))
    assert isinstance(decoder_of(model), InvariantDecoder)
