"""engine.sampler=vllm against a fake server (fake_vllm.py): what is drawn and sent, and every fault."""

import base64
import io
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import FakeVLLM, fake_vllm
from jobs import engine_config, on_two_ranks, tiny, tiny_model

from r1pipe.chat.template import Chat
from r1pipe.core.errors import ConfigError, NumericProblem, SamplerLost
from r1pipe.core.paths import content_dir
from r1pipe.model.policy import named_weights
from r1pipe.runs.stopping import Stopped
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout import SamplingParams, Whole
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.rollout.vllm import serving
from r1pipe.train.rollout.vllm.requests import experts_of
from r1pipe.train.rollout.vllm.sampler import VLLMSampler
from r1pipe.train.rollout.vllm.worker import r1pipe_wire as wire

PROMPTS = [[1, 5, 9], [1, 7], [2, 4, 6, 8]]
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, n=2)
WORDS = Chat.load(content_dir() / "tokenizer").tokenizer.get_vocab(with_added_tokens=True)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "AGAIN_S", 0.02)


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    """With other weights than the trainer's."""
    model = tiny_model()
    with torch.no_grad():
        for tensor in named_weights(model).values():
            tensor.mul_(0.5)
    with fake_vllm(model, WORDS) as server:
        yield server


def opened(server: FakeVLLM, **given: Any) -> VLLMSampler:
    return opened_at(server.url, **given)


def opened_at(url: str, keep: bool = False, ranks: Ranks | None = None, **changed: Any) -> VLLMSampler:
    values = {"url": url, "timeout_s": 5.0, "wait_s": 5.0, **changed}
    config, shape = replace(tiny("grpo").sampler, **values), tiny_model().config
    sizes = shape.vocab_size, shape.hidden_size, shape.num_hidden_layers, shape.max_position_embeddings
    policy = serving.Policy(*sizes, wire.vocabulary_hash(WORDS), eos_ids=(3,))
    return VLLMSampler(config, ranks or Ranks(engine_config()), policy, None, keep=keep)


def other_model(seed: int = 1) -> Any:
    model = tiny_model()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=noise))
    return model.eval()


def in_process(model: Any, params: SamplingParams = PARAMS) -> list[list[int]]:
    sampler = BundledSampler((3,), 0)
    sampler.update(Whole(model), 0)
    return [completion.tokens for completion in sampler.generate(PROMPTS, params)]


def drawn(sampler: VLLMSampler, **more: Any) -> list[list[int]]:
    return [completion.tokens for completion in sampler.generate(PROMPTS, PARAMS, **more)]


def test_it_draws_what_the_sampler_in_this_process_draws(server: FakeVLLM) -> None:
    sampler, model = opened(server, bucket_mb=1), other_model()
    sampler.update(Whole(model), 3)
    done, ended = [], []
    found = sampler.generate(
        PROMPTS, PARAMS, lambda n, total: done.append((n, total)), lambda p, c: ended.append((p, c.tokens))
    )
    mine = BundledSampler((3,), 0)
    mine.update(Whole(model), 3)
    for theirs, ours in zip(found, mine.generate(PROMPTS, PARAMS), strict=True):
        assert (theirs.tokens, theirs.finish_reason, theirs.versions) == (
            ours.tokens,
            ours.finish_reason,
            ours.versions,
        )
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-6)
    assert done == [(n, 6) for n in range(1, 7)]
    assert sorted(ended) == sorted((i // 2, completion.tokens) for i, completion in enumerate(found))
    order = [path.partition("?")[0] for path in server.seen if "generate" not in path]
    update = ["/pause", "/get_world_size", "/init_weight_transfer_engine", "/start_weight_update"]
    buckets = order.count("/update_weights")
    update += ["/update_weights"] * buckets + ["/collective_rpc", "/finish_weight_update"]
    update += ["/reset_prefix_cache", "/resume", "/weight_info"]
    assert order[-len(update) :] == update


def test_the_same_version_is_sent_once_and_another_one_again(server: FakeVLLM) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(Whole(model), 0)
    sampler.update(Whole(model), 0)
    assert server.seen.count("/finish_weight_update") == 1
    with torch.no_grad():
        model.lm_head.weight.neg_()
    sampler.update(Whole(model), 1)
    assert server.seen.count("/finish_weight_update") == 2
    assert server.seen.count("/init_weight_transfer_engine") == 1
    assert drawn(sampler) == in_process(model)


def test_what_is_asked_for(server: FakeVLLM) -> None:
    sampler = opened(server)
    sampler.update(Whole(other_model()), 0)
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
    with pytest.raises(ConfigError, match="prompt 0 has 383 tokens; with max_tokens=4 it needs"):
        sampler.generate([[1] * 383], params)


def test_logprobs_of_a_nucleus_are_not_the_policys(server: FakeVLLM) -> None:
    sampler = opened(server)
    sampler.update(Whole(other_model()), 0)
    [found] = sampler.generate(PROMPTS[:1], SamplingParams(4, top_p=0.9))
    assert all(math.isnan(logprob) for logprob in found.logprobs)
    assert "logprobs" not in server.asked[-1]["sampling_params"]


def restart(server: FakeVLLM) -> None:
    """As a server that starts again: another process, the first weights, nobody connected."""
    server.version, server.group, server.loaded = "default", None, set()
    with torch.no_grad():
        for tensor in named_weights(server.model).values():
            tensor.mul_(0.5)


def other_trainer(server: FakeVLLM) -> None:
    restart(server)
    server.version = "0123456789abcdef:0"


@pytest.mark.parametrize("fault", [restart, other_trainer])
def test_other_weights_are_never_trained_on(
    server: FakeVLLM, fault: Callable[[FakeVLLM], None], caplog: pytest.LogCaptureFixture
) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(Whole(model), 7)
    server.after = {3: lambda: fault(server)}
    found = sampler.generate(PROMPTS, replace(PARAMS, max_num_seqs=1))
    assert [completion.tokens for completion in found] == in_process(model)
    assert {version for completion in found for _, version in completion.versions} == {7}
    assert "not this job's: it was restarted, or another job updates it" in caplog.text
    asked = server.seen.count("/inference/v1/generate")
    assert asked in (7, 8)  # two are kept, four missing; one is refused, and maybe one on its way


def test_an_older_version_is_refused(server: FakeVLLM, caplog: pytest.LogCaptureFixture) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(Whole(model), 7)
    label = server.version
    server.after = {1: lambda: setattr(server, "version", label.replace(":7", ":6"))}
    assert drawn(sampler) == in_process(model)
    assert "drew from version 6, not 7 to 7" in caplog.text


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/inference/v1/generate", "/inference/v1/generate answers 500: made on purpose"),
        ("/update_weights", "/update_weights answers 500: made on purpose"),
        ("/start_weight_update", "/start_weight_update answers 500: made on purpose"),
        ("/finish_weight_update", "/finish_weight_update answers 500: made on purpose"),
    ],
)
def test_a_server_that_answers_500_is_waited_for(
    server: FakeVLLM, path: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    sampler, model = opened(server, timeout_s=2.0), other_model()
    server.fail = {path: 500}
    timer = threading.Timer(0.4, server.fail.clear)
    timer.start()
    sampler.update(Whole(model), 0)
    assert drawn(sampler) == in_process(model)
    timer.join()
    assert told in caplog.text and "waits for it up to sampler.wait_s=5 s" in caplog.text


def test_a_server_that_stays_broken_ends_the_job_with_one_line(server: FakeVLLM) -> None:
    sampler = opened(server, wait_s=0.3)
    sampler.update(Whole(other_model()), 0)
    server.fail = {"/inference/v1/generate": 500}
    with pytest.raises(SamplerLost, match=r"^the sampler is lost: .* answers 500: .*run the same command"):
        drawn(sampler)


def test_a_server_that_hangs(server: FakeVLLM, caplog: pytest.LogCaptureFixture) -> None:
    sampler, model = opened(server, timeout_s=0.4), other_model()
    sampler.update(Whole(model), 0)
    server.hang.set()
    timer = threading.Timer(1.2, server.hang.clear)
    timer.start()
    assert drawn(sampler) == in_process(model)
    timer.join()
    assert "has drawn no token for 0.4 s (sampler.timeout_s)" in caplog.text


def test_a_server_that_dies_and_comes_back(server: FakeVLLM, caplog: pytest.LogCaptureFixture) -> None:
    sampler, model = opened(server), other_model()
    sampler.update(Whole(model), 4)
    port, again = server.server_address[1], []

    def die() -> None:
        def come_back() -> None:
            server.die()
            again.append(FakeVLLM(tiny_model(), WORDS, port))

        threading.Thread(target=come_back).start()
        server.hang.set()  # what it was drawing never comes

    server.after = {2: die}
    config = replace(sampler.config, timeout_s=0.5)
    sampler.config = config
    assert drawn(sampler) == in_process(model)
    assert again[0].version.endswith(":4")
    again[0].die()


def test_a_server_that_is_not_there(server: FakeVLLM) -> None:
    sampler = opened(server, wait_s=0.2)
    server.die()
    with pytest.raises(SamplerLost, match=r"the sampler is lost: .*Connection refused.*run the same command"):
        sampler.update(Whole(other_model()), 0)
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
            "takes 100 tokens, the trainer's model 384; start it with --max-model-len 384",
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
    server.fail = {"/collective_rpc": 404}
    with pytest.raises(
        SamplerLost, match=r"does not know r1pipe's extension .*start it as docs/guide.md says"
    ):
        opened(server)


def test_a_model_that_the_trainer_sends_in_part_is_refused(server: FakeVLLM) -> None:
    class Part(Whole):
        def buckets(self, most_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            tensors = named_weights(self.model)
            del tensors["model.norm.weight"]
            yield tensors

    with pytest.raises(SamplerLost, match=r"has model\.norm\.weight and 0 other tensors that the trainer's"):
        opened(server).update(Part(other_model()), 0)


def test_a_request_to_stop_ends_the_drawing(server: FakeVLLM) -> None:
    sampler = opened(server)
    sampler.update(Whole(other_model()), 0)
    server.hang.set()
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        drawn(sampler, stop=lambda: next(asked))
    server.hang.clear()


def test_a_completion_goes_on_after_an_update_beside_the_main_thread(server: FakeVLLM) -> None:
    sampler, model = opened(server, keep=True), other_model()
    sampler.update(Whole(model), 1)
    server.hang.set()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(sampler.generate(PROMPTS, PARAMS)))
    thread.start()
    while len(server.asked) < 6:
        threading.Event().wait(0.01)
    newer = other_model(2)
    sampler.update(Whole(newer), 2)
    server.hang.clear()
    thread.join()
    assert {span[1] for completion in found for span in completion.versions} == {2}
    assert [completion.tokens for completion in found] == in_process(newer)
    assert "/pause?mode=keep" in server.seen
    assert "/reset_prefix_cache?reset_running_requests=true" in server.seen


def test_beside_the_main_thread_a_failure_is_told_at_once(server: FakeVLLM) -> None:
    sampler = opened(server)
    sampler.update(Whole(other_model()), 0)
    server.fail = {"/inference/v1/generate": 500}
    told: list[str] = []

    def draw() -> None:
        with suppress(AssertionError), pytest.raises(SamplerLost) as raised:
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
    sampler.update(Whole(other_model()), 0)
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


def encoded(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def test_routes_are_those_of_the_tokens_that_gave_the_probabilities() -> None:
    routes = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3)  # a prompt of 3 and 3 tokens
    assert np.array_equal(experts_of(encoded(routes), 3, 3), routes[2:])
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
