"""`r1pipe doctor`: finds the most common faults of a run in under a minute, before hours are spent on it.

CHECKS is the table, in the order of the report. A check is one function from the context to an outcome. The
checks of the policy share one probe; the later ones train it by one step, and it is thrown away at the end.

    context        what the checks share: limits (conf/doctor/limits.yaml), data, engine and probe
    data           columns, gold answers, duplicates, overlap with the evaluation
    template       the chat template; rewards under it, <think>, end of sequence, lengths
    policy         truncation, variance, sampler against trainer, save and load
    reward_models  their quality, what they read, what refusals earn, whether general prompts are scored
    resources      device, memory and disk
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
from r1pipe.doctor import data, policy, resources, reward_models, template
from r1pipe.doctor.context import Context, Outcome
from r1pipe.runs.findings import FAIL, ORDER, PASS, WARN, Finding
from r1pipe.train.engine.ranks import Ranks

__all__ = ["CHECKS", "Check", "Context", "examine", "run_check"]

Kinds = tuple[type[StageConfig], ...]
RL: Kinds = (RLConfig,)
PROMPTED: Kinds = (RLConfig, FineTuneConfig)
TRAINED: Kinds = (*PROMPTED, PretrainConfig, RewardModelConfig)
EVALUATED: Kinds = (*PROMPTED, EvaluateConfig)
ALL: Kinds = (*TRAINED, EvaluateConfig)


@dataclass(frozen=True)
class Check:
    """A function that measures, and the stages that it makes sense for."""

    measure: Callable[[Context], Outcome]
    kinds: Kinds
    all_ranks: bool = False  # it uses the engine, so every rank calls it; the worst rank's outcome counts
    all_scenario: bool = False  # only for stages with reward models; others pass


CHECKS: dict[str, Check] = {
    "device": Check(resources.device, ALL),
    "data": Check(data.readable, EVALUATED),
    "gold answers": Check(data.gold_answers, EVALUATED),
    "chat template": Check(template.conversations, ALL),
    "rewards": Check(template.rewards, PROMPTED),
    "custom rewards": Check(template.custom_rewards, RL),
    "end of sequence": Check(template.end_of_sequence, ALL, all_ranks=True),
    "lengths": Check(template.lengths, PROMPTED),
    "duplicates": Check(data.duplicates, PROMPTED),
    "overlap": Check(data.overlap, PROMPTED),
    "reward models": Check(reward_models.quality, RL, all_scenario=True),
    "what judges read": Check(reward_models.inputs, RL, all_scenario=True),
    "refusals": Check(reward_models.refusals, RL, all_scenario=True),
    "opens <think>": Check(template.opens_think, RL, all_ranks=True),
    "truncation": Check(policy.truncation, RL, all_ranks=True),
    "variance": Check(policy.variance, RL, all_ranks=True),
    "general prompts": Check(reward_models.general_prompts, RL, all_ranks=True, all_scenario=True),
    "logprobs": Check(policy.logprobs, RL, all_ranks=True),
    "routing": Check(policy.routing, RL, all_ranks=True),
    "after a weight sync": Check(policy.after_sync, RL, all_ranks=True),
    "save and load": Check(policy.round_trip, TRAINED, all_ranks=True),
    "memory": Check(resources.memory, TRAINED),
    "disk": Check(resources.disk, TRAINED),
}


def run_check(context: Context, name: str) -> Finding:
    """The finding of one check on this rank. Raises the user's errors that the check meets."""
    check = CHECKS[name]
    if check.all_scenario and not context.preference:
        return Finding(name, PASS, "not needed: this stage has rule-based rewards only")
    status, value, remedy = check.measure(context)
    return Finding(name, status, value, "" if status == PASS else remedy)


def examine(context: Context) -> list[Finding]:
    """Run every check that makes sense for the stage; a user's error fails the first check that meets it.

    Call it on all ranks. Rank 0's list counts: the others take part only in the checks of all ranks.
    """
    ranks = Ranks(context.config.engine)
    findings: list[Finding] = []
    failed_by: dict[str, str] = {}  # error -> the first check that met it
    for name, check in CHECKS.items():
        if not isinstance(context.config.stage, check.kinds) or (ranks.rank and not check.all_ranks):
            continue
        result: Finding | str
        try:
            result = run_check(context, name)
        except R1pipeError as problem:
            result = str(problem)
        results = ranks.all_gather_objects(result) if check.all_ranks else [result]
        error = next((result for result in results if isinstance(result, str)), None)
        if error is None:
            of_ranks = [result for result in results if isinstance(result, Finding)]
            findings.append(max(of_ranks, key=lambda finding: ORDER.index(finding.status)))
        elif error in failed_by:
            findings.append(Finding(name, WARN, "not measured", f"fix first: {failed_by[error]}"))
        else:
            failed_by[error] = name
            findings.append(Finding(name, FAIL, "could not run", error))
    return findings
