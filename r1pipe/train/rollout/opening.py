"""Which sampler a job draws with."""

from collections.abc import Callable
from pathlib import Path

from r1pipe.chat.template import Chat
from r1pipe.config import RunConfig
from r1pipe.train.rollout.bundled import BundledSampler, Copy
from r1pipe.train.rollout.sampler import Ranks, Sampler


def open_sampler(
    config: RunConfig,
    chat: Chat,
    ranks: Ranks,
    source: Path,
    log_folder: Path,
    show: Callable[[int, int], None],
) -> Sampler:
    """The sampler that engine.sampler names; to be closed at the job's end. All ranks call.

    `source`: the folder that the tokenizer comes from. `show` gets how many seconds a server has been
    starting, and how many it may. Raises SamplerLost and Refused where a server cannot be used.
    """
    engine = config.engine
    if engine.sampler == "vllm":
        from r1pipe.train.rollout.vllm.opening import open_vllm

        return open_vllm(config, chat, ranks, source, log_folder, show)
    if engine.sampler == "transformers":
        from r1pipe.train.rollout.transformers import TransformersSampler

        return TransformersSampler(chat.eos_ids, chat.pad_id)
    precisions = ("same", engine.precision)
    copy = None if engine.sampler_precision in precisions else Copy(engine)
    return BundledSampler(chat.eos_ids, chat.pad_id, engine.graphs, copy)
