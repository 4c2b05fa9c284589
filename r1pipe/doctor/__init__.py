"""`r1pipe doctor`: what goes wrong most often before and in a run, looked for in under a minute.

CHECKS is the table, in the order of the answer: a check is one function from the context to a finding. Those
that need a probe share one, and the checks after it train it by a step: it is thrown away at the end.

    context    what checks look at, made when first asked for; the limits (conf/doctor/limits.yaml)
    data       columns, gold answers, duplicates, overlap with the evaluation
    template   rewards under this chat format, <think>, end of sequence, what fits
    policy     the probe: truncation, variance, sampler beside trainer, save and load
    resources  device, memory and disk
    judges     the reward models' quality
"""

from collections.abc import Callable
from dataclasses import dataclass

from r1pipe.config.schema import (
    EvaluateConfig,
    PretrainConfig,
    RejectionConfig,
    RewardModelConfig,
    RLConfig,
    SFTConfig,
    StageConfig,
)
from r1pipe.doctor import data, judges, policy, resources, template
from r1pipe.doctor.context import Context
from r1pipe.errors import R1pipeError
from r1pipe.findings import FAIL, WARN, Finding

__all__ = ["CHECKS", "Check", "Context", "examine"]

Kinds = tuple[type[StageConfig], ...]
RL: Kinds = (RLConfig,)
PROMPTED: Kinds = (RLConfig, SFTConfig, RejectionConfig)
TRAINED: Kinds = (*PROMPTED, PretrainConfig, RewardModelConfig)
MEASURED: Kinds = (*PROMPTED, EvaluateConfig)


@dataclass(frozen=True)
class Check:
    """A question to the context, and the stages that it makes sense for."""

    look: Callable[[Context, str], Finding]
    kinds: Kinds


CHECKS: dict[str, Check] = {
    "device": Check(resources.device, (*TRAINED, EvaluateConfig)),
    "data": Check(data.readable, MEASURED),
    "gold answers": Check(data.gold_answers, MEASURED),
    "rewards": Check(template.rewards, PROMPTED),
    "end of sequence": Check(template.end_of_sequence, (*TRAINED, EvaluateConfig)),
    "lengths": Check(template.lengths, PROMPTED),
    "duplicates": Check(data.duplicates, PROMPTED),
    "overlap": Check(data.overlap, PROMPTED),
    "opens <think>": Check(template.opens_think, RL),
    "truncation": Check(policy.truncation, RL),
    "variance": Check(policy.variance, RL),
    "logprobs": Check(policy.logprobs, RL),
    "after a weight sync": Check(policy.after_sync, RL),
    "save and load": Check(policy.round_trip, TRAINED),
    "memory": Check(resources.memory, TRAINED),
    "disk": Check(resources.disk, TRAINED),
    "reward models": Check(judges.quality, RL),
}


def examine(context: Context) -> list[Finding]:
    """Every check that makes sense for the stage. A user's error, met on the way, is a failed check."""
    found: list[Finding] = []
    met: dict[str, str] = {}  # error -> the check that told it
    for name, check in CHECKS.items():
        if not isinstance(context.config.stage, check.kinds):
            continue
        try:
            found.append(check.look(context, name))
        except R1pipeError as error:
            line = str(error)
            if line in met:
                found.append(Finding(name, WARN, "not measured", f"first mend: {met[line]}"))
            else:
                met[line] = name
                found.append(Finding(name, FAIL, "cannot be done", line))
    return found
