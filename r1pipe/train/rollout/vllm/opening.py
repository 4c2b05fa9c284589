"""Opens the sampler of engine.sampler=vllm from a job's config."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import torch

from r1pipe.chat.template import Chat
from r1pipe.config import HFConfig, ModelConfig, RunConfig
from r1pipe.core.errors import ConfigError
from r1pipe.model.names import CONFIG, published_config
from r1pipe.runs.files import write_json
from r1pipe.train.rollout.sampler import Ranks
from r1pipe.train.rollout.vllm.sampler import VLLMSampler
from r1pipe.train.rollout.vllm.server import Served, Server
from r1pipe.train.rollout.vllm.serving import Policy
from r1pipe.train.rollout.vllm.worker.r1pipe_wire import vocabulary_hash

LOG = "vllm.txt"


def open_vllm(
    config: RunConfig,
    chat: Chat,
    ranks: Ranks,
    source: Path,
    log_folder: Path,
    show: Callable[[int, int], None],
) -> VLLMSampler:
    """All ranks call. `source`: the folder with config.json, for a model of transformers.

    Raises SamplerLost and Refused where the server of sampler.url cannot be used.
    """
    shape = config.model
    policy = Policy(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        longest=shape.max_position_embeddings,
        vocabulary=vocabulary_hash(chat.tokenizer.get_vocab(with_added_tokens=True)),
        eos_ids=chat.eos_ids,
        dense_layers=shape.first_k_dense_replace if isinstance(shape, ModelConfig) else 0,
    )
    server = None
    if config.sampler.url is None:
        on_gpu, replay = ranks.device.type == "cuda", getattr(config.stage, "replay_routing", False)
        if replay and not on_gpu:
            raise ConfigError(
                "stage.replay_routing=true with engine.sampler=vllm needs GPUs: vLLM tells no choice of "
                "experts on a CPU; give engine.sampler=bundled"
            )
        if ranks.rank == 0:
            folder = tempfile.TemporaryDirectory(prefix="r1pipe-vllm-")  # mode 0700
            dtype = "float32" if config.engine.precision == "fp32" else "bfloat16"
            write_shape(shape, source, Path(folder.name), dtype)
            served = Served(dtype, policy.longest, _sequences(config, ranks), on_gpu, experts=replay)
            server = Server(config.sampler, served, folder, log_folder / LOG)
    return VLLMSampler(config.sampler, ranks, policy, server, show, keep=config.engine.async_steps > 0)


def write_shape(shape: ModelConfig | HFConfig, source: Path, folder: Path, dtype: str) -> None:
    """config.json: what a server needs to know of a model besides its weights."""
    if isinstance(shape, HFConfig):
        copyfile(source / CONFIG, folder / CONFIG)
    else:
        write_json(folder / CONFIG, published_config(shape, getattr(torch, dtype)))


def _sequences(config: RunConfig, ranks: Ranks) -> int:
    """The most completions that all ranks ask for at a time."""
    parts = (getattr(config.stage, name, None) for name in ("sampling", "eval"))
    return ranks.world_size * max(part.max_num_seqs for part in parts if part is not None)
