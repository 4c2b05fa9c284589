"""Samplers: prompts in, completions out."""

from r1pipe.train.rollout.drawing import SamplingParams
from r1pipe.train.rollout.opening import open_sampler
from r1pipe.train.rollout.sampler import Ended, Sampler, Weights, WholeWeights

__all__ = ["Ended", "Sampler", "SamplingParams", "Weights", "WholeWeights", "open_sampler"]
