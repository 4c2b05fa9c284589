"""`make test-vllm`: weights sent to a real vLLM on the CPU, as engine.sampler=vllm does; checks per model.

The server is r1pipe's own, in the environment that R1PIPE_VLLM_PYTHON names.
"""

import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import write_model
from jobs import engine_config, tiny

from r1pipe.chat.template import Chat
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Completion
from r1pipe.model import Policy as Model
from r1pipe.model import load_pretrained
from r1pipe.runs.files import read_object, write_json
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.rollout.vllm.sampler import VLLMSampler
from r1pipe.train.rollout.vllm.server import Served, Server
from r1pipe.train.rollout.vllm.serving import Policy
from r1pipe.train.rollout.vllm.worker.r1pipe_wire import vocabulary_hash

pytestmark = pytest.mark.vllm
LONG = 200  # tokens of a prompt: more than a block of vLLM's cache on a CPU (128), so that its prefix is kept
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
CLOSE = 2e-4  # nats: both compute in float32, in another order


class Bench:
    """One model with its folder, its server and its sampler."""

    def __init__(self, folder: Path, log: Path):
        self.model: Model = load_pretrained(folder).float().eval()
        chat, shape = Chat.load(folder), self.model.config
        words = vocabulary_hash(chat.tokenizer.get_vocab(with_added_tokens=True))
        sizes = shape.vocab_size, shape.hidden_size, shape.num_hidden_layers, shape.max_position_embeddings
        temporary = tempfile.TemporaryDirectory(prefix="r1pipe-vllm-")
        write_json(Path(temporary.name) / "config.json", read_object(folder / "config.json"))
        config = replace(tiny("grpo").sampler, python=os.environ["R1PIPE_VLLM_PYTHON"], bucket_mb=1)
        served = Served("float32", shape.max_position_embeddings, 32, on_gpu=False)
        self.server = Server(config, served, temporary, log)
        self.eos_ids = chat.eos_ids
        policy = Policy(*sizes, words, self.eos_ids)
        self.sampler = VLLMSampler(config, Ranks(engine_config()), policy, self.server)
        generator = torch.Generator().manual_seed(5)
        lengths = (7, 12, LONG)
        self.prompts = [
            torch.randint(10, chat.vocab_size, (n,), generator=generator).tolist() for n in lengths
        ]
        self.version = -1

    def push(self) -> float:
        """Send the model's weights as a new version; seconds."""
        self.version += 1
        began = time.monotonic()
        self.sampler.update(WholeWeights(self.model), self.version)
        return time.monotonic() - began

    def move(self, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.mul_(1 + 0.1 * torch.randn(tensor.shape, generator=noise))

    def theirs(self, params: SamplingParams = GREEDY) -> list[Completion]:
        return self.sampler.generate(self.prompts, params)

    def one_by_one(self) -> list[Completion]:
        """The same work for vLLM each time: which requests it takes together depends on when they come."""
        drawn = [self.sampler.generate([prompt], GREEDY) for prompt in self.prompts]
        return [completion for each in drawn for completion in each]

    def ours(self) -> list[Completion]:
        sampler = BundledSampler(self.eos_ids, 0)
        sampler.update(WholeWeights(self.model), self.version)
        return sampler.generate(self.prompts, GREEDY)

    def apart(self) -> float:
        """The greatest difference of a log-probability to the sampler in this process; the tokens, their
        ends and versions must be the same."""
        pairs = list(zip(self.theirs(), self.ours(), strict=True))
        for theirs, ours in pairs:
            told = theirs.tokens, theirs.finish_reason, theirs.versions
            assert told == (ours.tokens, ours.finish_reason, ours.versions)
        return max(difference(theirs, ours) for theirs, ours in pairs)


def difference(one: Completion, other: Completion) -> float:
    return max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))


@pytest.fixture(scope="module", params=["moe", "qwen2", "llama"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    assert os.environ.get("R1PIPE_VLLM_PYTHON"), "`make test-vllm` says where vLLM's python is"
    folder = tmp_path_factory.mktemp(request.param)
    model = content_dir() / "base"
    if request.param != "moe":  # vLLM's attention on a CPU has no heads of less than 32
        model = write_model(folder / "model", request.param, hidden_size=128)
    bench = Bench(model, folder / "vllm.txt")
    try:
        began = time.monotonic()
        bench.push()
        print(f"\n{request.param}: started and updated in {time.monotonic() - began:.0f} s")
        yield bench
    finally:
        bench.sampler.close()


def test_the_same_weights_sent_again_change_nothing(bench: Bench) -> None:
    before = bench.one_by_one()
    seconds = [bench.push() for _ in range(3)]
    after = bench.one_by_one()
    assert [c.tokens for c in before] == [c.tokens for c in after]
    apart = max(difference(*pair) for pair in zip(before, after, strict=True))
    size = sum(tensor.nbytes for tensor in bench.model.state_dict().values()) / 1e6
    print(f"\n{size:.1f} MB sent in {min(seconds):.2f} s; log-probabilities {apart:.1e} apart at most")
    assert apart < 1e-6


def test_other_weights_draw_what_the_sampler_in_this_process_draws(bench: Bench) -> None:
    bench.move(1)
    bench.push()
    apart = bench.apart()
    print(f"\nvLLM and the sampler in this process: {apart:.1e} apart at most")
    assert apart < CLOSE


def test_a_prefix_cache_that_is_not_reset_is_stale(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.theirs()  # fills the cache
    bench.move(2)
    client = bench.sampler.serving.client
    post = client.post

    def without_reset(path: str, *given: Any, **more: str) -> dict[str, Any]:
        if path == "/reset_prefix_cache":
            return {"success": True}
        return post(path, *given, **more, **({"clear_cache": "false"} if path == "/pause" else {}))

    with monkeypatch.context() as patch:
        patch.setattr(client, "post", without_reset)
        bench.push()
    stale = max(
        difference(*pair) if pair[0].tokens == pair[1].tokens else math.inf
        for pair in zip(bench.theirs(), bench.ours(), strict=True)
    )
    bench.push()
    fresh = bench.apart()
    print(f"\nwith a stale prefix {stale:.1e} apart, after a reset {fresh:.1e}")
    assert stale > CLOSE > fresh


def test_a_completion_says_which_weights_drew_which_of_its_tokens(bench: Bench) -> None:
    found: list[Completion] = []
    params = SamplingParams(max_tokens=150, temperature=1.0, n=4, ignore_eos=True, seed=3)
    bench.sampler.serving.keep = True
    thread = threading.Thread(target=lambda: found.extend(bench.sampler.generate(bench.prompts, params)))
    first = bench.version
    before = bench.sampler.serving.client.generated()
    thread.start()
    while bench.sampler.serving.client.generated() < before + 200:
        time.sleep(0.02)
    bench.push()
    thread.join()
    bench.sampler.serving.keep = False
    assert len(found) == 12
    assert all(sum(n for n, _ in c.versions) == len(c.tokens) == 150 for c in found)
    spans = {tuple(version for _, version in c.versions) for c in found}
    print(f"\nspans of versions: {sorted(spans)}")
    assert (first, first + 1) in spans


def test_seeds_give_the_same_completions_again(bench: Bench) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, n=8, seed=11)
    one, other = bench.theirs(params), bench.theirs(params)
    assert [c.tokens for c in one] == [c.tokens for c in other]
    assert len({tuple(c.tokens) for c in one}) > 12


def test_a_server_that_is_killed_is_started_and_drawn_from_again(bench: Bench) -> None:
    process = bench.server.process
    assert process

    def kill() -> None:
        os.killpg(process.pid, signal.SIGKILL)

    params = SamplingParams(max_tokens=100, temperature=1.0, n=8, ignore_eos=True, seed=3)
    timer = threading.Timer(0.5, kill)
    timer.start()
    found = bench.theirs(params)
    assert bench.server.process is not process
    assert {version for c in found for _, version in c.versions} == {bench.version}
    assert [len(c.tokens) for c in found] == [100] * 24
    assert bench.apart() < CLOSE
