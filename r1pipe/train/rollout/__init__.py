"""Samplers: prompts in, completions out."""

from r1pipe.train.rollout.drawing import SamplingParams
from r1pipe.train.rollout.sampler import Ended, Sampler

__all__ = ["Ended", "Sampler", "SamplingParams"]
