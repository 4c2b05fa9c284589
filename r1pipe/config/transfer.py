"""What puts a teacher into a student besides SFT: `stage.transfer`, with a config for each way."""

from dataclasses import dataclass
from typing import Literal

from r1pipe.config.fields import AboveZero, Count, NonNegative, Positive, Rules, Share, Strict
from r1pipe.config.stages import SamplingConfig


@dataclass
class DivergenceConfig(Strict):
    """The student's distribution of each next token towards the teacher's (GKD, arXiv 2306.13649)."""

    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon"]  # KL(teacher || student), its reverse, or between
    beta: Share  # of jensen_shannon: the teacher's share of the mixture; near 0 as forward, near 1 as reverse KL
    temperature: AboveZero  # divides both models' logits; stored probabilities bear 1 only
    on_policy: Share  # share of a batch's rows whose prompts the student answers itself (GKD's lambda)
    sampling: SamplingConfig  # of those answers


@dataclass
class RankingConfig(Strict):
    """The student learns which of two answers is preferred."""

    loss: Literal["dpo", "simpo"]  # relative to the first student (DPO), or by length and without it (SimPO)
    beta: AboveZero  # how much a difference of log-probabilities counts
    target_margin: NonNegative  # what the preferred answer is to lead by (SimPO's gamma); 0: none
    sft_weight: NonNegative  # of -log p of the preferred answer's tokens beside it, so that it stays likely
    max_tokens_per_micro_batch: Positive  # padded tokens per forward pass on one rank; a pair is not split
    sampling: SamplingConfig  # of the student's own answers, which are rejected
