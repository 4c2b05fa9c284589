"""The sampler: the cache against the full forward pass, the drawing, and the order of results."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import SHAPES, V2_SHAPES, ours, tiny, tokens

from r1pipe.core.errors import ConfigError
from r1pipe.model.cache import Decoder, LatentCache
from r1pipe.model.kernels.build import runs_here
from r1pipe.model.native import NativeDecoder
from r1pipe.train.rollout import SamplingParams, drawing
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.rollout.drawing import draw, uniform_stream

EOS, PAD = 1, 0
SMALL = tiny(num_hidden_layers=2, vocab_size=24, initializer_range=0.08)  # one token in 24 ends


def prompts(count: int, config, shortest: int = 1) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [
        generator.integers(2, config.vocab_size, generator.integers(shortest, shortest + 9)).tolist()
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", [Decoder, NativeDecoder])
@pytest.mark.parametrize("name", SHAPES | V2_SHAPES)
@torch.no_grad()
def test_cached_decode_equals_full_forward_at_every_position(name, kind):
    model = ours((SHAPES | V2_SHAPES)[name])
    if kind is NativeDecoder and not runs_here(torch.float32):
        pytest.skip("the CPU kernels do not run here")
    decoder = kind(model)
    tokens_BT = tokens(4, 40, model.config)
    full = model(tokens_BT)
    lengths = torch.tensor([3, 9, 1, 6])
    cache = LatentCache(model, 4, 40)
    cache.entries_LSMW.fill_(1e3)  # what was there before must not show
    entries, logits = decoder.prefill(tokens_BT[:, :9], lengths)
    rows = torch.arange(4)
    torch.testing.assert_close(logits, full[rows, lengths - 1], atol=1e-4, rtol=0)
    cache.fill(rows, entries, rows)
    for step in range(30):
        positions = lengths + step
        logits = decoder.decode(tokens_BT[rows, positions], positions, cache, int(positions.max()) + 1)
        torch.testing.assert_close(logits, full[rows, positions], atol=1e-4, rtol=0)


@pytest.mark.parametrize("slots", [4, 64])
@torch.no_grad()
def test_reported_logprobs_equal_the_full_forward(slots):
    """Slots are refilled, shrunk, shared by n samples: every token must keep the model's own logprob."""
    model = ours(SMALL)
    asked = prompts(9, model.config)
    params = SamplingParams(max_tokens=24, temperature=0.7, n=3, seed=5)
    completions = Batcher(model, EOS, PAD, slots).generate(asked, params)
    assert len(completions) == 27
    lengths = {len(completion.tokens) for completion in completions}
    assert len(lengths) > 3, "completions must be ragged for this test to mean anything"
    for number, completion in enumerate(completions):
        prompt = asked[number // 3]
        logits = model(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
        ends = completion.tokens[-1] == EOS
        assert completion.finish_reason == ("stop" if ends else "length")
        assert EOS not in completion.tokens[:-1]
        assert ends or len(completion.tokens) == 24


def test_completions_do_not_depend_on_the_slots():
    model = ours(SMALL)
    asked = prompts(5, model.config)
    params = SamplingParams(max_tokens=12, n=2, seed=3)
    one, few, many = (Batcher(model, EOS, PAD, slots).generate(asked, params) for slots in (1, 4, 99))
    assert [c.tokens for c in one] == [c.tokens for c in few] == [c.tokens for c in many]
    assert one[0].tokens != one[1].tokens
    other = Batcher(model, EOS, PAD, 5).generate(asked, SamplingParams(max_tokens=12, n=2, seed=4))
    assert [c.tokens for c in other] != [c.tokens for c in one]


def test_completions_do_not_depend_on_how_prompts_are_shared_out():
    model = ours(SMALL)
    asked = prompts(5, model.config)
    params = SamplingParams(max_tokens=12, n=2, seed=3)
    whole = Batcher(model, EOS, PAD, 4).generate(asked, params)
    for rank in range(2):
        share = replace(params, first=rank, stride=2)
        mine = Batcher(model, EOS, PAD, 4).generate(asked[rank::2], share)
        expected = [completion for prompt in range(rank, 5, 2) for completion in whole[2 * prompt :][:2]]
        assert [c.tokens for c in mine] == [c.tokens for c in expected]


@pytest.mark.parametrize("slots", [2, 99])
def test_each_prompt_may_have_a_limit_of_its_own_and_the_cache_grows_with_it(slots, monkeypatch):
    monkeypatch.setattr("r1pipe.train.rollout.batching.CACHE_TOKENS", 1)
    model = ours(SMALL)
    asked, limits = prompts(5, model.config), [1, 40, 3, 17, 24]
    params = SamplingParams(max_tokens=40, n=2, seed=3, ignore_eos=True)
    whole = Batcher(model, EOS, PAD, slots).generate(asked, params)
    limited = Batcher(model, EOS, PAD, slots).generate(asked, params, limits=limits)
    expected = [one.tokens[: limits[number // 2]] for number, one in enumerate(whole)]
    assert [completion.tokens for completion in limited] == expected
    with pytest.raises(ConfigError, match="prompt 1 has"):
        Batcher(model, EOS, PAD).generate(asked, params, limits=[1, model.config.max_position_embeddings] * 3)


def test_long_prompt_lists_are_prefilled_in_parts(monkeypatch):
    model = ours(SMALL)
    asked = prompts(8, model.config)
    params = SamplingParams(max_tokens=6, n=2)
    whole = Batcher(model, EOS, PAD, 16).generate(asked, params)
    monkeypatch.setattr("r1pipe.train.rollout.batching.PREFILL_TOKENS", 12)
    assert [c.tokens for c in Batcher(model, EOS, PAD, 16).generate(asked, params)] == [
        c.tokens for c in whole
    ]


@torch.no_grad()
def test_greedy_takes_the_most_likely_token():
    model = ours(tiny())
    asked = prompts(3, model.config)
    for prompt, completion in zip(
        asked,
        Batcher(model, EOS, PAD, 2).generate(asked, SamplingParams(max_tokens=8, temperature=0.0)),
        strict=True,
    ):
        row = list(prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            logprobs = model(torch.tensor([row]))[0, -1].log_softmax(-1)
            assert token == int(logprobs.argmax())
            assert logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
            row.append(token)


def test_ignore_eos_runs_to_the_limit_and_progress_ends_at_the_total():
    model = ours(SMALL)
    calls: list[tuple[int, int]] = []
    params = SamplingParams(max_tokens=10, n=4, ignore_eos=True)
    completions = Batcher(model, EOS, PAD, 3).generate(
        prompts(2, model.config), params, lambda *c: calls.append(c)
    )
    assert {len(c.tokens) for c in completions} == {10}
    assert {c.finish_reason for c in completions} == {"length"}
    assert calls[-1] == (8, 8) and calls == sorted(calls)


def test_a_single_token_is_drawn_where_one_is_asked_for():
    model = ours(tiny())
    completions = Batcher(model, EOS, PAD).generate(prompts(3, model.config), SamplingParams(max_tokens=1))
    assert [len(c.tokens) for c in completions] == [1, 1, 1]


def test_the_cache_is_freed_with_the_last_completion(monkeypatch):
    """At once, not when Python next looks for cycles: a run would hold those of several rollouts."""
    made: list[weakref.ref[LatentCache]] = []
    make = Decoder.cache

    def watched(decoder: Decoder, slots: int, length: int) -> LatentCache:
        cache = make(decoder, slots, length)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(Decoder, "cache", watched)
    model = ours(SMALL)
    gc.disable()
    try:
        Batcher(model, EOS, PAD).generate(prompts(3, SMALL), SamplingParams(max_tokens=4))
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def test_no_prompts_no_completions():
    assert Batcher(ours(tiny()), EOS, PAD).generate([], SamplingParams(max_tokens=4)) == []


@pytest.mark.parametrize("prompt", [[], [5] * 2557])
def test_prompts_that_cannot_be_are_refused(prompt):
    with pytest.raises(ConfigError, match="prompt 1"):
        Batcher(ours(tiny()), EOS, PAD).generate([[2], prompt], SamplingParams(max_tokens=4))


@pytest.mark.parametrize(
    "change", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"n": 0}, {"seed": -1}]
)
def test_params_that_cannot_be_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        SamplingParams(**{"max_tokens": 4, **change})


def test_drawn_frequencies_follow_the_distribution():
    logits = torch.tensor([0.5, -1.0, 2.0, float("-inf"), 0.0])
    uniform = torch.from_numpy(uniform_stream(1, 2, 3, 40000))
    for temperature in (1.0, 0.6):
        params = SamplingParams(max_tokens=1, temperature=temperature)
        drawn, logprobs = draw(logits.expand(len(uniform), -1), uniform, params)
        expected = (logits / temperature).softmax(-1)
        shares = torch.bincount(drawn, minlength=5) / len(drawn)
        torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
        torch.testing.assert_close(logprobs, expected.log()[drawn], atol=1e-5, rtol=0)


def test_nucleus_draws_inside_and_reports_the_whole_distribution():
    probs = torch.tensor([0.05, 0.5, 0.15, 0.3])
    uniform = torch.linspace(0, 1, 1000)[:-1]
    drawn, logprobs = draw(probs.log().expand(999, -1), uniform, SamplingParams(max_tokens=1, top_p=0.75))
    shares = torch.bincount(drawn, minlength=4) / 999
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.625, 0.0, 0.375]), atol=0.005, rtol=0)
    torch.testing.assert_close(logprobs, probs.log()[drawn], atol=1e-5, rtol=0)


def test_a_nucleus_of_a_large_vocabulary_is_that_of_a_whole_sort(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[12.0], [4.0], [0.1]]).repeat(20, 1)  # few, some and most tokens hold the nucleus
    logits = torch.randn(60, 5000, generator=generator) * spread
    uniform = torch.rand(60, generator=generator)
    params = SamplingParams(max_tokens=1, top_p=0.9)
    drawn, logprobs = draw(logits, uniform, params)
    alone = torch.cat([draw(logits[i : i + 1], uniform[i : i + 1], params)[0] for i in range(60)])
    monkeypatch.setattr(drawing, "LIKELIEST", 5000)
    whole, expected = draw(logits, uniform, params)
    assert torch.equal(drawn, whole) and torch.equal(drawn, alone) and torch.equal(logprobs, expected)


def test_the_largest_uniform_number_never_draws_an_impossible_token():
    almost_one = torch.nextafter(torch.tensor([1.0]), torch.tensor([0.0])).expand(50)
    logits = torch.full((50, 1000), float("-inf"))
    logits[:, :997] = torch.randn(50, 997, generator=torch.Generator().manual_seed(0))
    drawn, _ = draw(logits, almost_one, SamplingParams(max_tokens=1))
    assert drawn.max() < 997


def test_streams_depend_on_seed_prompt_and_sample_alone():
    stream = uniform_stream(7, 1, 2, 8)
    assert np.array_equal(stream[:4], uniform_stream(7, 1, 2, 4))
    others = [
        uniform_stream(8, 1, 2, 8),
        uniform_stream(7, 2, 2, 8),
        uniform_stream(7, 1, 3, 8),
        uniform_stream(7, 2, 1, 8),
    ]
    assert all(not np.array_equal(stream, other) for other in others)


def test_bfloat16_samples():
    model = ours(tiny()).bfloat16()
    completions = Batcher(model, EOS, PAD).generate(prompts(3, model.config), SamplingParams(max_tokens=5))
    assert all(np.isfinite(c.logprobs).all() for c in completions)


def test_a_sampler_of_a_model_alone_ends_where_vllm_would():
    """At the model's own end tokens and at stop_token_ids; ignore_eos takes away the former alone."""
    model, asked = ours(SMALL), prompts(6, SMALL)
    params = SamplingParams(max_tokens=24, seed=3)
    free = Batcher(model).generate(asked, params)
    assert {completion.finish_reason for completion in free} == {"length"}, "no model.eos_ids, no end"
    model.eos_ids = (EOS, 5)
    for changes, ends in (
        ({}, {EOS, 5}),
        ({"stop_token_ids": (7,)}, {EOS, 5, 7}),
        ({"stop_token_ids": (7,), "ignore_eos": True}, {7}),
    ):
        stopped = Batcher(model).generate(asked, replace(params, **changes))
        assert any(completion.finish_reason == "stop" for completion in stopped)
        for whole, completion in zip(free, stopped, strict=True):
            first = next((n + 1 for n, token in enumerate(whole.tokens) if token in ends), 24)
            assert completion.tokens == whole.tokens[:first]
            assert completion.truncated == (completion.tokens[-1] not in ends)
    with pytest.raises(ConfigError, match="vocab_size"):
        Batcher(model).generate(asked, replace(params, stop_token_ids=(24,)))
