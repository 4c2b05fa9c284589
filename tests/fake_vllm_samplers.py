"""Samplers of a fake vLLM server, and what they are compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from fake_vllm import FakeVLLM, fake_vllm
from jobs import engine_config, tiny, tiny_model

from r1pipe.chat.template import Chat
from r1pipe.core.paths import content_dir
from r1pipe.model.policy import named_weights
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.rollout.vllm import serving
from r1pipe.train.rollout.vllm.sampler import VLLMSampler
from r1pipe.train.rollout.vllm.worker import r1pipe_wire as wire

PROMPTS = [[1, 5, 9], [1, 7], [2, 4, 6, 8]]
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, n=2)
WORDS = Chat.load(content_dir() / "tokenizer").tokenizer.get_vocab(with_added_tokens=True)


def opened(server: FakeVLLM, **given: Any) -> VLLMSampler:
    return opened_at(server.url, **given)


def opened_at(url: str, keep: bool = False, ranks: Ranks | None = None, **changed: Any) -> VLLMSampler:
    values = {"url": url, "timeout_s": 60.0, "wait_s": 60.0, **changed}
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
    sampler.update(WholeWeights(model), 0)
    return [completion.tokens for completion in sampler.generate(PROMPTS, params)]


def drawn(sampler: VLLMSampler, **more: Any) -> list[list[int]]:
    return [completion.tokens for completion in sampler.generate(PROMPTS, PARAMS, **more)]


def restart(server: FakeVLLM) -> None:
    """As a server that starts again: another process, the first weights, nobody connected."""
    server.version, server.group, server.loaded = "default", None, set()
    with torch.no_grad():
        for tensor in named_weights(server.model).values():
            tensor.mul_(0.5)


def other_trainer(server: FakeVLLM) -> None:
    restart(server)
    server.version = "0123456789abcdef:0"


@contextmanager
def serving_other_weights() -> Iterator[FakeVLLM]:
    """A fake server that begins with other weights than the trainer's."""
    model = tiny_model()
    with torch.no_grad():
        for tensor in named_weights(model).values():
            tensor.mul_(0.5)
    with fake_vllm(model, WORDS) as server:
        yield server
