"""The compiled forward pass: what it is made of, what it must equal, and what happens where it cannot run."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shapes import SHAPES, ours, tiny, tokens

from r1pipe.core.errors import ConfigError, NumericProblem
from r1pipe.model.cache import Decoder, LatentCache
from r1pipe.model.kernels import build
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.native import NativeDecoder, decoder_of, pack
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

LENGTHS = torch.tensor([3, 9, 1, 6])
runs = pytest.mark.skipif(not runs_here(torch.float32), reason="the CPU kernels do not run here")
runs_bf16 = pytest.mark.skipif(not runs_here(torch.bfloat16), reason="no bfloat16 products here")
ODD = tiny(  # hardly a multiple of a register, a tile or a panel
    hidden_size=68, num_attention_heads=3, kv_lora_rank=34, qk_nope_head_dim=14, qk_rope_head_dim=6,
    v_head_dim=10, moe_intermediate_size=20, intermediate_size=50, n_routed_experts=6, n_group=3,
    topk_group=2, num_experts_per_tok=3, q_lora_rank=18,
)  # fmt: skip


def steps(decoder: Decoder, tokens_BT: torch.Tensor, count: int) -> torch.Tensor:
    """Logits after the prompts and after each of `count` further tokens, [1 + count, B, V] float32."""
    entries, logits = decoder.prefill(tokens_BT[:, : int(LENGTHS.max())], LENGTHS)
    cache = LatentCache(decoder.model, len(tokens_BT), tokens_BT.shape[1])
    rows, found = torch.arange(len(tokens_BT)), [logits.float()]
    cache.fill(rows, entries, rows)
    for step in range(count):
        at = LENGTHS + step
        found.append(decoder.decode(tokens_BT[rows, at], at, cache, int(at.max()) + 1).float())
    return torch.stack(found)


@runs
@torch.no_grad()
def test_widths_that_fill_no_register():
    model, tokens_BT = ours(ODD), tokens(4, 40, ODD)
    torch.testing.assert_close(
        steps(NativeDecoder(model), tokens_BT, 25), steps(Decoder(model), tokens_BT, 25), atol=1e-4, rtol=0
    )


@runs_bf16
@pytest.mark.parametrize("name", ["v3", "v3_yarn", "tied"])
@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_torch_is(name):
    config = replace(SHAPES[name], num_experts_per_tok=16, n_group=1, topk_group=1)  # no choice can flip
    tokens_BT = tokens(4, 40, config)
    exact = steps(Decoder(ours(config).bfloat16().float()), tokens_BT, 20)
    torchs, compiled = (
        (steps(kind(ours(config).bfloat16()), tokens_BT, 20) - exact).norm()
        for kind in (Decoder, NativeDecoder)
    )
    assert 0 < compiled < 1.1 * torchs


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=runs), pytest.param(torch.bfloat16, marks=runs_bf16)]
)
@torch.no_grad()
def test_what_lies_behind_a_position_is_never_read(dtype):
    """Not even with weight 0: 0 times NaN is NaN."""
    model, tokens_BT = ours(SHAPES["v3"]).to(dtype), tokens(4, 40, SHAPES["v3"])
    decoder, rows = NativeDecoder(model), torch.arange(4)
    entries, _ = decoder.prefill(tokens_BT[:, :9], LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        entries[:, row, length:] = float("nan")
    cache = LatentCache(model, 4, 40)
    cache.entries_LSMW.fill_(float("nan"))
    cache.fill(rows, entries, rows)
    for step in range(9):
        at = LENGTHS + step
        assert decoder.decode(tokens_BT[rows, at], at, cache, 40).isfinite().all()


@torch.no_grad()
def test_torchs_decoder_with_many_slots_equals_the_full_forward():
    """So many that the kernels of whole rows would find its small operators worthwhile."""
    model, tokens_BT = ours(SHAPES["v3"]), tokens(70, 12, SHAPES["v3"])
    full, decoder, rows = model(tokens_BT), Decoder(model), torch.arange(70)
    lengths = rows % 9 + 1
    entries, _ = decoder.prefill(tokens_BT[:, :9], lengths)
    cache = LatentCache(model, 70, 12)
    cache.fill(rows, entries, rows)
    logits = decoder.decode(tokens_BT[rows, lengths], lengths, cache, 12)
    torch.testing.assert_close(logits, full[rows, lengths], atol=1e-4, rtol=0)


@runs
@torch.no_grad()
def test_threads_do_not_change_a_bit():
    config = tiny(num_hidden_layers=2)
    model = ours(config)
    asked = tokens(150, 20, config).tolist()
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(Batcher(model).generate(asked, SamplingParams(max_tokens=12, temperature=0.9)))
    torch.set_num_threads(threads)
    assert [(c.tokens, c.logprobs) for c in found[0]] == [(c.tokens, c.logprobs) for c in found[1]]


@runs
def test_weights_of_now_are_used():
    model = ours(SHAPES["v3"])
    params = SamplingParams(max_tokens=4, temperature=0.0)
    before = Batcher(model).generate([[5, 6, 7]], params)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert Batcher(model).generate([[5, 6, 7]], params)[0].tokens != before[0].tokens


@runs
@pytest.mark.parametrize(
    "where", ["model.layers.2.mlp.experts.down_proj", "model.layers.0.self_attn.o_proj.weight"]
)
def test_not_finite_weights_stop_the_sampler(where):
    model = ours(SHAPES["v3"])
    with torch.no_grad():
        model.get_parameter(where).fill_(float("nan"))
    with pytest.raises(NumericProblem, match=where.removesuffix(".down_proj").removesuffix(".weight")):
        Batcher(model).generate([[5, 6, 7]], SamplingParams(max_tokens=4))


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ConfigError, match="prompt 1 has a token outside the vocabulary"):
        Batcher(ours(SHAPES["v3"])).generate([[5], [5, token]], SamplingParams(max_tokens=4))


@runs
def test_packed_weights_by_hand():
    weight = torch.arange(2 * 70 * 4.0).view(2, 70, 4)
    packed = pack(weight)
    assert packed.shape == (2, 2, 4, 64)
    assert packed[1, 1, 3, 5] == weight[1, 69, 3] and packed[0, 0, 2, 7] == weight[0, 7, 2]


@runs_bf16
def test_packed_pairs_by_hand():
    weight = torch.arange(2 * 70 * 4.0).view(2, 70, 4)
    pairs = pack(weight.bfloat16())
    assert pairs.shape == (2, 2, 2, 64, 2)
    assert pairs[0, 0, 1, 7, 1] == weight[0, 7, 3].bfloat16()


@runs
def test_what_the_kernels_do_not_know_goes_through_torch():
    assert isinstance(decoder_of(ours(SHAPES["v3"])), NativeDecoder)
    assert type(decoder_of(ours(SHAPES["v3"]).double())) is Decoder
    odd = tiny(qk_nope_head_dim=15, qk_rope_head_dim=8, v_head_dim=16)
    assert type(decoder_of(ours(odd).bfloat16())) is Decoder  # bfloat16 products take pairs
    mixed = ours(SHAPES["v3"])
    mixed.lm_head.double()
    assert type(decoder_of(mixed)) is Decoder


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine where nothing has been compiled yet, and may be what a test makes of it."""
    monkeypatch.setenv("R1PIPE_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    build.library.cache_clear()
    build.runs_here.cache_clear()


@pytest.mark.parametrize("compiler", ["nowhere-g++", "false"])
def test_without_a_working_compiler_one_line_says_what_is_lost(compiler, fresh, monkeypatch, capfd):
    monkeypatch.setenv("CXX", compiler)
    assert build.library() is None and build.library() is None
    said = capfd.readouterr().err.splitlines()
    warnings = [line for line in said if "torch's operators are used" in line]
    assert len(warnings) == 1 and "CXX" in warnings[0]
    assert type(decoder_of(ours(SHAPES["v3"]))) is Decoder
    assert not list(fresh.glob("cache/*.so"))


@runs
@pytest.mark.parametrize("processor", ["haswell", "skylake-avx512", "cooperlake"])
def test_kernels_compile_for_every_kind_of_processor(processor):
    """With AVX2 alone, with AVX-512, and with its products of bfloat16."""
    flags = [flag for flag in build.FLAGS if not flag.startswith("-march")]
    include = f"-I{Path(torch.__file__).parent}/include"
    command = ["g++", *flags, f"-march={processor}", include, "-fsyntax-only"]
    for source in sorted(build.SOURCES.glob("*.cpp")):
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@runs_bf16
def test_a_torch_whose_onednn_may_not_use_avx512_does_the_work_itself():
    code = "import torch; from r1pipe.model.kernels.build import runs_here; print(runs_here(torch.bfloat16))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("features", ["sse", "sse avx", "sse avx avx2", "sse avx fma"])
def test_an_old_processor_takes_torch(features, fresh, monkeypatch):
    monkeypatch.setattr(build, "_processor", lambda: f"an old one fpu {features}")
    assert not runs_here(torch.float32) and not runs_here(torch.bfloat16)
    assert type(decoder_of(ours(SHAPES["v3"]))) is Decoder


@runs
@pytest.mark.slow
def test_ranks_that_start_together_compile_once(fresh):
    code = "from r1pipe.model.kernels.build import library; assert library() is not None"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = "".join(rank.communicate()[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said.count("compiling the CPU kernels") == 1
