"""Which sampler a job draws with."""

from r1pipe.chat.template import Chat
from r1pipe.config import EngineConfig
from r1pipe.train.rollout.bundled import BundledSampler, Copy
from r1pipe.train.rollout.sampler import Sampler


def open_sampler(config: EngineConfig, chat: Chat) -> Sampler:
    """The sampler that engine.sampler names; to be closed at the job's end."""
    if config.sampler == "transformers":
        from r1pipe.train.rollout.transformers import TransformersSampler

        return TransformersSampler(chat.eos_ids, chat.pad_id)
    precisions = ("same", config.precision)
    copy = None if config.sampler_precision in precisions else Copy(config)
    return BundledSampler(chat.eos_ids, chat.pad_id, config.graphs, copy)
