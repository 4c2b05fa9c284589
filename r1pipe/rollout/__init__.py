"""Samplers: prompts in, completions out."""

from r1pipe.rollout.drawing import SamplingParams
from r1pipe.rollout.sampler import Sampler

__all__ = ["Sampler", "SamplingParams"]
