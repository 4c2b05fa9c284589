"""How a student learns from a teacher besides SFT: `stage.transfer`, with a config for each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from r1pipe.config.fields import AboveZero, Discount, NonNegative, Positive, Rules, Share, Strict
from r1pipe.config.rl import ReinforcementConfig, RLConfig, any_weight, rl_rules
from r1pipe.config.stages import FineTuneConfig, SamplingConfig, StageConfig


@dataclass
class DivergenceConfig(Strict):
    """The student's distribution of each next token towards the teacher's (GKD, arXiv 2306.13649)."""

    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon"]  # forward is KL(teacher || student)
    beta: Share  # of jensen_shannon: the teacher's share of the mixture; near 0 as forward, near 1 as reverse
    temperature: AboveZero  # divides both models' logits; of stored probabilities it is 1
    on_policy: Share  # share of a batch's rows whose prompts the student answers itself (GKD's lambda)
    sampling: SamplingConfig  # of those answers


@dataclass
class TaughtConfig(ReinforcementConfig):
    """Reinforcement whose advantages may come from the teacher, token by token (on-policy distillation)."""

    teacher_coef: NonNegative  # weight of log pi_teacher - log pi_student in a token's advantage; 0: none
    teacher_discount: Discount  # of the following tokens' share in it; 0: each token for itself
    score_weight: NonNegative  # weight of the teacher's score of an answer in its reward; 0: none


@dataclass
class RankingConfig(Strict):
    """The student learns which of two answers is preferred."""

    loss: Literal["dpo", "simpo"]  # relative to the first student (DPO), or per token and without it (SimPO)
    beta: AboveZero  # how much a difference of log-probabilities counts
    target_margin: NonNegative  # what the preferred answer is to lead by (SimPO's gamma); 0: none
    sft_weight: NonNegative  # of -log p per token of the preferred answer beside it, so that it stays likely
    max_tokens_per_micro_batch: Positive  # padded tokens per forward pass on one rank; a pair is not split
    sampling: SamplingConfig  # of the student's own answers, which are the rejected ones


@dataclass
class TransferConfig(FineTuneConfig):
    """A stage that puts a teacher into a student."""

    transfer: Literal["sft", "divergence", "rl", "ranking"]  # the file in conf/stage/part/transfer/
    divergence: DivergenceConfig | None  # with transfer=divergence only
    rl: TaughtConfig | None  # with transfer=rl only
    ranking: RankingConfig | None  # with transfer=ranking only


def samplings(stage: StageConfig) -> dict[str, SamplingConfig]:
    """How the student draws answers while it learns: key -> settings; one or none."""
    if not isinstance(stage, TransferConfig):
        return {}
    configs = {"divergence": stage.divergence, "rl": stage.rl, "ranking": stage.ranking}
    return {f"stage.{name}.sampling": config.sampling for name, config in configs.items() if config}


def transfer_rules(stage: TransferConfig, ranks: int) -> Rules:
    for name in ("divergence", "rl", "ranking"):
        given = getattr(stage, name) is not None
        if given != (stage.transfer == name):
            yield (
                f"{stage.transfer=!s} {'takes no' if given else 'needs'} stage.{name}; say "
                f"stage.transfer={name} and leave stage.{name} to it"
            )
    if stage.divergence:
        yield from divergence_rules(stage.divergence)
    for key, sampling in samplings(stage).items():
        if sampling.top_p == 0:
            yield f"{key}.top_p=0 leaves nothing to draw; it must be above 0"
    if stage.rl:
        yield from taught_rules(stage, stage.rl, ranks)


def divergence_rules(config: DivergenceConfig) -> Rules:
    if config.kind == "jensen_shannon" and config.beta in (0, 1):
        end = "forward_kl" if config.beta == 0 else "reverse_kl"
        yield (
            f"stage.divergence.beta={config.beta:g} leaves nothing of one side: give "
            f"stage.divergence.kind={end}, or a beta between 0 and 1"
        )


def taught_rules(stage: TransferConfig, rl: TaughtConfig, ranks: int) -> Rules:
    if rl.algorithm != "grpo" or rl.preference is not None:
        yield "stage.rl has neither a value model nor reward models; leave stage.rl.algorithm and .preference"
    if not (rl.teacher_coef or rl.score_weight or any_weight(rl)):
        yield (
            "stage.rl.rewards.weights, stage.rl.teacher_coef and stage.rl.score_weight are all 0; nothing "
            "would be learned"
        )
    yield from below_rl(rl_rules(as_rl(stage), ranks, rl.teacher_coef > 0, rl.score_weight > 0))


def below_rl(rules: Rules) -> Rules:
    """Messages on reinforcement with its keys where a distillation has them."""
    yield from map(in_distillation, rules)


def in_distillation(message: str) -> str:
    """A message on reinforcement with its keys where a distillation has them."""
    names = "|".join(field.name for field in fields(ReinforcementConfig))
    return re.sub(rf"\bstage\.(?=(?:{names})\b)", "stage.rl.", message)


def as_rl(stage: TransferConfig) -> RLConfig:
    """The stage as reinforcement sees it: `stage.rl` and what every stage has."""
    rl = stage.rl
    assert rl is not None
    own: Mapping[str, Any] = {field.name: getattr(rl, field.name) for field in fields(ReinforcementConfig)}
    common = {field.name: getattr(stage, field.name) for field in fields(StageConfig)}
    return RLConfig(**common, **own)
