"""engine.sampler=vllm against a fake server (fake_vllm.py): what is drawn, and what is sent."""

import base64
import io
import math
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import FakeVLLM
from fake_vllm_samplers import (
    PARAMS,
    PROMPTS,
    drawn,
    in_process,
    opened,
    other_model,
    serving_other_weights,
)

from r1pipe.core.errors import ConfigError
from r1pipe.runs.stopping import Stopped
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.rollout.vllm import serving
from r1pipe.train.rollout.vllm.requests import experts_of
from r1pipe.train.rollout.vllm.worker import r1pipe_wire as wire


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "AGAIN_S", 0.02)


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with serving_other_weights() as server:
        yield server


def test_it_draws_what_the_sampler_in_this_process_draws(server: FakeVLLM) -> None:
    sampler, model = opened(server, bucket_mb=1), other_model()
    sampler.update(WholeWeights(model), 3)
    done, ended = [], []
    found = sampler.generate(
        PROMPTS, PARAMS, lambda n, total: done.append((n, total)), lambda p, c: ended.append((p, c.tokens))
    )
    mine = BundledSampler((3,), 0)
    mine.update(WholeWeights(model), 3)
    for theirs, ours in zip(found, mine.generate(PROMPTS, PARAMS), strict=True):
        assert (theirs.tokens, theirs.finish_reason, theirs.versions) == (
            ours.tokens,
            ours.finish_reason,
            ours.versions,
        )
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-5)
    assert done == [(n, 6) for n in range(1, 7)]
    assert sorted(ended) == sorted((i // 2, completion.tokens) for i, completion in enumerate(found))
    order = [path.partition("?")[0] for path in server.seen if "generate" not in path]
    update = ["/pause", "/get_world_size", "/init_weight_transfer_engine", "/start_weight_update"]
    buckets = order.count("/update_weights")
    update += ["/update_weights"] * buckets + ["/collective_rpc", "/reset_prefix_cache"]
    update += ["/finish_weight_update", "/resume", "/weight_info"]
    assert order[-len(update) :] == update


def test_the_same_version_is_sent_once_and_another_one_again(server: FakeVLLM) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(WholeWeights(model), 0)
    sampler.update(WholeWeights(model), 0)
    assert server.seen.count("/finish_weight_update") == 1
    with torch.no_grad():
        model.lm_head.weight.neg_()
    sampler.update(WholeWeights(model), 1)
    assert server.seen.count("/finish_weight_update") == 2
    assert server.seen.count("/init_weight_transfer_engine") == 1
    assert drawn(sampler) == in_process(model)


def test_what_is_asked_for(server: FakeVLLM) -> None:
    sampler = opened(server)
    sampler.update(WholeWeights(other_model()), 0)
    params = SamplingParams(4, 0.7, 1.0, 2, seed=5, first=1, stride=2, stop_token_ids=(9,))
    sampler.generate(PROMPTS, params, limits=[1, 2, 3])
    asked = sorted(server.asked, key=lambda body: PROMPTS.index(body["token_ids"]))
    assert [body["sampling_params"]["max_tokens"] for body in asked] == [1, 1, 2, 2, 3, 3]
    for body in asked:
        given = body["sampling_params"]
        assert (given["temperature"], given["logprobs"], given["detokenize"]) == (0.7, 0, False)
        assert (given["ignore_eos"], given["stop_token_ids"]) == (True, [3, 9])
    seeds = {body["sampling_params"]["seed"] for body in asked}
    assert len(seeds) == 6
    server.asked.clear()
    one = replace(params, first=3)  # prompt 1 of the ranks' share is number 3 of all
    sampler.generate(PROMPTS[1:2], one, limits=[2])
    assert {body["sampling_params"]["seed"] for body in server.asked} < seeds
    with pytest.raises(ConfigError, match="prompt 0 has a token outside the vocabulary"):
        sampler.generate([[9999]], params)
    with pytest.raises(ConfigError, match="prompt 0 has 511 tokens; with max_tokens=4 it needs"):
        sampler.generate([[1] * 511], params)


def test_logprobs_of_a_nucleus_are_not_the_policys(server: FakeVLLM) -> None:
    sampler = opened(server)
    sampler.update(WholeWeights(other_model()), 0)
    [found] = sampler.generate(PROMPTS[:1], SamplingParams(4, top_p=0.9))
    assert all(math.isnan(logprob) for logprob in found.logprobs)
    assert "logprobs" not in server.asked[-1]["sampling_params"]


def test_a_request_to_stop_ends_the_drawing(server: FakeVLLM) -> None:
    sampler = opened(server)
    sampler.update(WholeWeights(other_model()), 0)
    server.hang.set()
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        drawn(sampler, stop=lambda: next(asked))
    server.hang.clear()


def test_a_completion_goes_on_after_an_update_beside_the_main_thread(server: FakeVLLM) -> None:
    sampler, model = opened(server, keep=True), other_model()
    sampler.update(WholeWeights(model), 1)
    server.hang.set()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(sampler.generate(PROMPTS, PARAMS)))
    thread.start()
    while len(server.asked) < 6:
        threading.Event().wait(0.01)
    newer = other_model(2)
    sampler.update(WholeWeights(newer), 2)
    server.hang.clear()
    thread.join()
    assert {span[1] for completion in found for span in completion.versions} == {2}
    assert [completion.tokens for completion in found] == in_process(newer)
    assert "/pause?mode=keep" in server.seen
    assert "/reset_prefix_cache?reset_running_requests=true" in server.seen


def encoded(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def test_routes_are_those_of_the_tokens_that_gave_the_probabilities() -> None:
    routes = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3)  # a prompt of 3 and 3 tokens
    assert np.array_equal(experts_of(encoded(routes), 3, 3), routes[2:])
    assert np.array_equal(experts_of(encoded(routes), 3, 3, dense_layers=1), routes[2:, 1:])
    for wrong in (encoded(routes[:4]), encoded(routes[0]), encoded(routes.astype(float)), "%%"):
        with pytest.raises(ValueError, match="routes"):
            experts_of(wrong, 3, 3)
    with pytest.raises(ValueError, match="pickle"):
        experts_of(base64.b64encode(pickle.dumps(routes)).decode(), 3, 3)


def test_buckets_carry_every_type_and_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(3.0),
        "view": torch.randn(4, 6, generator=generator)[:, ::2],
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    there = dict(wire.unpack(wire.pack(tensors, torch.device("cpu")), wire.layout_of(tensors)))
    assert there.keys() == tensors.keys()
    assert all(torch.equal(there[name], tensor) for name, tensor in tensors.items())
