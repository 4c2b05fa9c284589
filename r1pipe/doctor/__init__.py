"""`r1pipe doctor`: what goes wrong most often before and in a run, looked for in under a minute.

CHECKS is the table, in the order of the answer: a check is one function from the context to a finding. Those
that need a probe share one, and the checks after it train it by a step: it is thrown away at the end.

    context    what checks look at, made when first asked for; the limits (conf/doctor/limits.yaml)
    data       columns, gold answers, duplicates, overlap with the evaluation
    template   rewards under this chat format, <think>, end of sequence, what fits
    policy     the probe: truncation, variance, sampler beside trainer, save and load
    resources  device, memory and disk
    judges     the reward models' quality
    general    general prompts: judged or not, what the reward models read, what refusals earn
"""

from collections.abc import Callable
from dataclasses import dataclass

from r1pipe.config import (
    EvaluateConfig,
    FineTuneConfig,
    PretrainConfig,
    RewardModelConfig,
    RLConfig,
    StageConfig,
)
from r1pipe.core.errors import R1pipeError
from r1pipe.doctor import data, general, judges, policy, resources, template
from r1pipe.doctor.context import Context
from r1pipe.runs.findings import FAIL, ORDER, WARN, Finding
from r1pipe.train.engine.ranks import Ranks

__all__ = ["CHECKS", "Check", "Context", "examine"]

Kinds = tuple[type[StageConfig], ...]
RL: Kinds = (RLConfig,)
PROMPTED: Kinds = (RLConfig, FineTuneConfig)
TRAINED: Kinds = (*PROMPTED, PretrainConfig, RewardModelConfig)
MEASURED: Kinds = (*PROMPTED, EvaluateConfig)


@dataclass(frozen=True)
class Check:
    """A question to the context, and the stages that it makes sense for."""

    look: Callable[[Context, str], Finding]
    kinds: Kinds
    together: bool = False  # takes all ranks: it asks for the engine; what the worst rank finds counts


CHECKS: dict[str, Check] = {
    "device": Check(resources.device, (*TRAINED, EvaluateConfig)),
    "data": Check(data.readable, MEASURED),
    "gold answers": Check(data.gold_answers, MEASURED),
    "rewards": Check(template.rewards, PROMPTED),
    "end of sequence": Check(template.end_of_sequence, (*TRAINED, EvaluateConfig), together=True),
    "lengths": Check(template.lengths, PROMPTED),
    "duplicates": Check(data.duplicates, PROMPTED),
    "overlap": Check(data.overlap, PROMPTED),
    "reward models": Check(judges.quality, RL),
    "what judges read": Check(general.reads, RL),
    "refusals": Check(general.refusals, RL),
    "opens <think>": Check(template.opens_think, RL, together=True),
    "truncation": Check(policy.truncation, RL, together=True),
    "variance": Check(policy.variance, RL, together=True),
    "general prompts": Check(general.judged, RL, together=True),
    "logprobs": Check(policy.logprobs, RL, together=True),
    "routing": Check(policy.routing, RL, together=True),
    "after a weight sync": Check(policy.after_sync, RL, together=True),
    "save and load": Check(policy.round_trip, TRAINED, together=True),
    "memory": Check(resources.memory, TRAINED),
    "disk": Check(resources.disk, TRAINED),
}


def examine(context: Context) -> list[Finding]:
    """Every check that makes sense for the stage. A user's error, met on the way, is a failed check.

    All ranks call; what rank 0 gets counts, as the others take part only where they must.
    """
    ranks = Ranks(context.config.engine)
    found: list[Finding] = []
    met: dict[str, str] = {}  # error -> the check that told it
    for name, check in CHECKS.items():
        if not isinstance(context.config.stage, check.kinds) or (ranks.rank and not check.together):
            continue
        mine = _outcome(check, context, name)
        outcomes = ranks.all_gather_objects(mine) if check.together else [mine]
        error = next((one for one in outcomes if isinstance(one, str)), None)
        if error is None:
            findings = [one for one in outcomes if isinstance(one, Finding)]
            found.append(max(findings, key=lambda finding: ORDER.index(finding.status)))
        elif error in met:
            found.append(Finding(name, WARN, "not measured", f"first mend: {met[error]}"))
        else:
            met[error] = name
            found.append(Finding(name, FAIL, "cannot be done", error))
    return found


def _outcome(check: Check, context: Context, name: str) -> Finding | str:
    """What the check finds, or the user's error that it meets."""
    try:
        return check.look(context, name)
    except R1pipeError as error:
        return str(error)
