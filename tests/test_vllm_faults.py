"""engine.sampler=vllm against a fake server (fake_vllm.py) that fails: one clear line, nothing lost."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM
from fake_vllm_samplers import (
    PARAMS,
    PROMPTS,
    WORDS,
    drawn,
    in_process,
    opened,
    other_model,
    other_trainer,
    restart,
    serving_other_weights,
)
from jobs import on_two_ranks, tiny_model

from r1pipe.core.errors import NumericProblem, SamplerLost
from r1pipe.model.policy import named_weights
from r1pipe.train.rollout import WholeWeights
from r1pipe.train.rollout.vllm import serving
from r1pipe.train.rollout.vllm.worker import r1pipe_wire as wire


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "AGAIN_S", 0.02)


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with serving_other_weights() as server:
        yield server


@pytest.mark.parametrize("fault", [restart, other_trainer])
def test_other_weights_are_never_trained_on(
    server: FakeVLLM, fault: Callable[[FakeVLLM], None], caplog: pytest.LogCaptureFixture
) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(WholeWeights(model), 7)
    server.after = {3: lambda: fault(server)}
    found = sampler.generate(PROMPTS, replace(PARAMS, max_num_seqs=1))
    assert [completion.tokens for completion in found] == in_process(model)
    assert {version for completion in found for _, version in completion.versions} == {7}
    assert "not this job's: it was restarted, or another job updates it" in caplog.text
    asked = server.seen.count("/inference/v1/generate")
    assert asked in (7, 8)  # two are kept, four missing; one is refused, and maybe one on its way


def test_an_older_version_is_refused(server: FakeVLLM, caplog: pytest.LogCaptureFixture) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(WholeWeights(model), 7)
    label = server.version
    server.after = {1: lambda: setattr(server, "version", label.replace(":7", ":6"))}
    assert drawn(sampler) == in_process(model)
    assert "drew from version 6, not 7 to 7" in caplog.text


@pytest.mark.parametrize(
    "path",
    [
        "/inference/v1/generate",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/resume",
    ],
)
def test_a_server_that_answers_500_is_waited_for(
    server: FakeVLLM, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    sampler, model = opened(server), other_model()
    server.fail = {path: 2}
    sampler.update(WholeWeights(model), 0)
    assert drawn(sampler) == in_process(model)
    lines = [record.getMessage() for record in caplog.records if "waits for it" in record.getMessage()]
    assert lines and all(f"{path} answers 500: made on purpose; waits for it up to" in line for line in lines)


def test_an_answer_that_comes_before_the_last_byte_is_seen_to_arrive(
    server: FakeVLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broadcast = wire._broadcast

    def late(group: Any, bucket: torch.Tensor) -> SimpleNamespace:
        work, until = broadcast(group, bucket), time.monotonic() + 0.3
        if threading.current_thread() is not threading.main_thread():
            return work  # of the server
        done = lambda: work.is_completed() and time.monotonic() > until  # noqa: E731
        return SimpleNamespace(is_completed=done, wait=work.wait)

    monkeypatch.setattr(wire, "_broadcast", late)
    sampler, model = opened(server), other_model()
    sampler.update(WholeWeights(model), 0)
    assert drawn(sampler) == in_process(model) and "waits for it" not in caplog.text


def test_a_server_that_stays_broken_ends_the_job_with_one_line(server: FakeVLLM) -> None:
    sampler = opened(server, wait_s=0.1)
    sampler.update(WholeWeights(other_model()), 0)
    server.fail = {"/inference/v1/generate": 10**6}
    with pytest.raises(SamplerLost, match=r"^the sampler is lost: .* answers 500: .*run the same command"):
        drawn(sampler)


def test_a_server_that_hangs(server: FakeVLLM, caplog: pytest.LogCaptureFixture) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(WholeWeights(model), 0)
    sampler.config = replace(sampler.config, timeout_s=0.4)  # of drawing alone
    server.hang.set()
    server.on = {"/collective_rpc": server.hang.clear}  # it is looked at, and has recovered
    assert drawn(sampler) == in_process(model)
    assert "has drawn no token for 0.4 s (sampler.timeout_s)" in caplog.text


def test_a_server_that_dies_and_comes_back(server: FakeVLLM, caplog: pytest.LogCaptureFixture) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(WholeWeights(model), 4)
    port, again = server.server_address[1], []

    def come_back() -> None:
        server.die()
        again.append(FakeVLLM(tiny_model(), WORDS, port))

    def die() -> None:
        server.hang.set()  # what it was drawing never comes
        threading.Thread(target=come_back).start()

    server.after = {2: die}
    assert drawn(sampler) == in_process(model)
    assert again[0].version.endswith(":4") and "waits for it" in caplog.text
    again[0].die()
    server.hang.clear()


def test_a_server_that_is_not_there(server: FakeVLLM) -> None:
    sampler = opened(server, wait_s=0.1)
    server.die()
    with pytest.raises(SamplerLost, match=r"the sampler is lost: .*Connection refused.*run the same command"):
        sampler.update(WholeWeights(other_model()), 0)
    with pytest.raises(SamplerLost, match=r"Connection refused.*start the server of sampler.url"):
        opened(server)


@pytest.mark.parametrize(
    ("fact", "value", "told"),
    [
        ("vocabulary", "0" * 64, "has another tokenizer than the trainer"),
        ("vocab_size", 32000, "has another model: its vocab_size is 32000, the trainer's is"),
        ("num_hidden_layers", 61, "has another model: its num_hidden_layers is 61, the trainer's is 2"),
        ("logprobs_mode", "raw_logprobs", "start it with --logprobs-mode processed_logprobs"),
        (
            "max_model_len",
            100,
            "takes 100 tokens, the trainer's model 512; start it with --max-model-len 512",
        ),
        ("protocol", 0, "has another model: its protocol is 0"),
    ],
)
def test_a_server_of_another_model_is_refused_before_anything_starts(
    server: FakeVLLM, fact: str, value: Any, told: str
) -> None:
    server.facts[fact] = value
    with pytest.raises(SamplerLost, match=told):
        opened(server)


def test_a_server_that_is_no_vllm_or_lacks_the_extension(server: FakeVLLM) -> None:
    server.fail = {"/collective_rpc": 1}
    with pytest.raises(
        SamplerLost, match=r"does not know r1pipe's extension .*start it as docs/guide.md says"
    ):
        opened(server)


def test_a_model_that_the_trainer_sends_in_part_is_refused(server: FakeVLLM) -> None:
    class Part(WholeWeights):
        def buckets(self, most_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            tensors = named_weights(self.model)
            del tensors["model.norm.weight"]
            yield tensors

    with pytest.raises(SamplerLost, match=r"has model\.norm\.weight and 0 other tensors that the trainer's"):
        opened(server).update(Part(other_model()), 0)


def test_beside_the_main_thread_a_failure_is_told_at_once(server: FakeVLLM) -> None:
    sampler = opened(server)
    sampler.update(WholeWeights(other_model()), 0)
    server.fail = {"/inference/v1/generate": 6}
    told: list[str] = []

    def draw() -> None:
        with pytest.raises(SamplerLost) as raised:
            drawn(sampler)
        told.append(str(raised.value))

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert "answers 500" in told[0]


def test_a_probability_that_is_none_ends_the_job(server: FakeVLLM) -> None:
    broken = other_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    sampler = opened(server)
    sampler.update(WholeWeights(other_model()), 0)
    generate = server.generate

    def nan(body: dict[str, Any]) -> dict[str, Any]:
        reply = generate(body)
        reply["choices"][0]["logprobs"]["content"][0]["logprob"] = -9999.0  # as vLLM writes NaN
        return reply

    server.generate = nan  # type: ignore[method-assign]
    with pytest.raises(NumericProblem, match="not finite in the vLLM server"):
        drawn(sampler)


@pytest.mark.slow
def test_two_ranks_go_the_same_way(tmp_path: Path) -> None:
    for rank in on_two_ranks("two_ranks_vllm.py", tmp_path)["ranks"]:
        assert rank["right"] and rank["versions"] == [5] and rank["none"]
        assert rank["lost"].startswith("the sampler is lost:") and "answers 500" in rank["lost"]
