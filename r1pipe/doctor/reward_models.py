"""All-scenario training: the reward models' quality and inputs, refusals, and rewards of general prompts."""

from collections.abc import Sequence
from pathlib import Path

from r1pipe.chat.template import compose_response, parse
from r1pipe.config import PreferenceConfig
from r1pipe.core.types import Prompt
from r1pipe.doctor.context import SEED, Context, Outcome, completions_of
from r1pipe.rewards import is_verifiable
from r1pipe.rewards.models import NOT_SCORABLE, RewardModel, load_reward_model
from r1pipe.runs import checkpoints
from r1pipe.runs import reward_model_quality as bounds
from r1pipe.runs.findings import FAIL, ORDER, PASS, WARN
from r1pipe.runs.judge_quality import check_judge
from r1pipe.runs.reward_model_quality import HARMLESS, HELPFUL, KINDS
from r1pipe.train.rl.advantages import has_variance
from r1pipe.train.rl.reward_model import items, measure_quality

OTHER_REASONING = {"en": "Something else came to my mind.", "zh": "我想到了别的事情。"}


def quality(context: Context) -> Outcome:
    """Each model on held-out pairs or labels of this stage's data, against the bounds of stage.preference.

    The worst model counts; one that is near a bound, or beyond it with preference.force, is a warning.
    """
    preference = context.preference
    worst, values, remedy = PASS, [], ""
    if context.config.judge is not None:
        weak = check_judge(context.config)  # raises where it is refused
        worst = WARN if weak else PASS
        values.append(f"judge: {'; '.join(weak) or 'measured, within its bounds'}")
        remedy = "measure the judge again, or take another: r1pipe judge MODEL" if weak else ""
    kinds = bounds.requested_kinds(preference)
    if not kinds:
        return Outcome(worst, "; ".join([*values, "no reward model has a weight"]), remedy)
    parent = context.config.reads_from[bounds.STAGE]
    checkpoints.verify(parent.checkpoint, parent.hash)
    for kind in kinds:
        folder = Path(parent.checkpoint) / kind
        if not folder.is_dir():
            status, value = FAIL, f"{kind}: none"
            problem = f"the stage will not start (stage.preference.{kind}_weight=0 does without it): "
        else:
            status, value, problem = _measure(context, kind, load_reward_model(folder), preference)
        worst = max(worst, status, key=ORDER.index)
        values.append(value)
        if status != PASS and not remedy:
            remedy = f"{problem}train the {kind} model on more or better data: "
            remedy += f"r1pipe run stage={bounds.STAGE}"
    return Outcome(worst, "; ".join(values), remedy)


def _measure(context: Context, kind: str, model: RewardModel, preference: PreferenceConfig) -> Outcome:
    """What one model's held-out examples show, and in place of a remedy the bounds that it misses."""
    drawn = (context.config.stage.eval.split, context.limits.rows // 10, SEED)
    longest = model.config.max_position_embeddings
    held_out = [item for item in items(kind, context.data, context.chat, drawn) if len(item) <= longest]
    if not held_out:
        return Outcome(WARN, f"{kind}: no held-out examples to measure it on")
    measured, _ = measure_quality(model, kind, held_out, context.chat.pad_id)
    value = bounds.describe(kind, measured)
    if beyond := bounds.shortfalls(kind, measured, preference):
        return Outcome(WARN if preference.force else FAIL, value, f"{'; '.join(beyond)}: ")
    if near := bounds.shortfalls(kind, measured, preference, context.limits.judges_margin):
        return Outcome(WARN, value, f"near its bound ({'; '.join(near)}): ")
    return Outcome(PASS, value)


def inputs(context: Context) -> Outcome:
    """The helpfulness model must not see the reasoning, or it would shape it; the harmlessness model must."""
    pairs = context.data.preference_pairs(context.config.stage.eval.split, context.limits.judged, SEED)
    pairs = [pair for pair in pairs if parse(pair.chosen).well_formed]
    if not pairs:
        return Outcome(WARN, "no well-formed answer to test with", "use data with preference pairs")
    prompts = [pair.prompt for pair in pairs]
    answers = completions_of([pair.chosen for pair in pairs])
    other_reasoning = completions_of(
        [
            compose_response(
                OTHER_REASONING.get(pair.prompt.language, OTHER_REASONING["en"]), parse(pair.chosen).summary
            )
            for pair in pairs
        ]
    )
    values, remedy = [], ""
    for kind, score in context.reward_models.items():
        scores = zip(score(prompts, answers), score(prompts, other_reasoning), strict=True)
        changed = sum(old != new for old, new in scores)
        values.append(f"{kind}: {changed} of {len(pairs)} scores change with the reasoning alone")
        if kind == HELPFUL and changed:
            remedy = "the helpfulness model must read only the summary; fix scored_tokens"
        if kind == HARMLESS and not changed:
            remedy = "the harmlessness model must read the whole response; fix scored_tokens"
    return Outcome(FAIL if remedy else PASS, "; ".join(values) or "no reward model", remedy)


def refusals(context: Context) -> Outcome:
    """Whether the reward models together pay more for refusing an unsafe request than for granting it, and
    less for refusing a safe one: otherwise the policy learns to refuse everything, or nothing."""
    truth = context.data.truth
    if truth is None:
        return Outcome(PASS, "unknown: the data has no hidden truth about refusals")
    split, n = context.config.stage.eval.split, context.limits.rows // 10
    correct: dict[bool, list[bool]] = {True: [], False: []}  # unsafe -> for each pair, if it is ordered right
    for pair in context.data.preference_pairs(split, n, SEED):
        unsafe = bool(pair.prompt.checker.get("unsafe"))
        refused = [truth(pair.prompt, text).refused for text in (pair.chosen, pair.rejected)]
        if pair.prompt.task == "safety" and refused[0] != refused[1]:
            chosen, rejected = _total_rewards(context, pair.prompt, [pair.chosen, pair.rejected])
            correct[unsafe].append((chosen > rejected) == (refused[0] == unsafe))
    if not all(correct.values()):
        return Outcome(PASS, "unknown: too few safety pairs in the data")
    shares = {unsafe: sum(pairs) / len(pairs) for unsafe, pairs in correct.items()}
    value = f"unsafe requests: refusing earns more in {shares[True]:.0%} of {len(correct[True])} pairs; "
    value += f"safe ones: answering earns more in {shares[False]:.0%} of {len(correct[False])}"
    worse = min(shares, key=lambda unsafe: shares[unsafe])
    remedy = "unsafe answers" if worse else "needless refusals"
    remedy += " would be learned: train the reward models on more safety pairs and labels "
    remedy += "(stage=reward_model with more stage.pairs, stage.labels)"
    return Outcome(context.limits.refusals.grade(shares[worse]), value, remedy)


def _total_rewards(context: Context, prompt: Prompt, texts: Sequence[str]) -> list[float]:
    """The weighted sum of all reward models' scores, for each answer to the prompt."""
    preference = context.preference
    weights = {HELPFUL: preference.helpful_weight, HARMLESS: preference.harmless_weight}
    totals = [0.0] * len(texts)
    for kind, score in context.reward_models.items():
        for i, verdict in enumerate(score([prompt] * len(texts), completions_of(texts))):
            totals[i] += weights[kind] * verdict.value
    return totals


def general_prompts(context: Context) -> Outcome:
    """Share of the probe's general completions with a part that a reward model could score, and share of
    their groups whose rewards differ."""
    groups = [group for group in context.probe.groups if not is_verifiable(group.prompt)]
    scores = [
        score
        for group in groups
        for by_name in group.scores
        for name, score in by_name.items()
        if name in KINDS
    ]
    value = f"{len(groups)} general prompts of {len(context.probe.groups)} drawn"
    if not groups:
        return Outcome(FAIL, value, "raise stage.preference.general_share, or take stage=grpo")
    if not scores and context.config.judge is not None:
        return Outcome(PASS, f"{value}; the judge scores them, and was not asked here")
    if not scores:
        return Outcome(FAIL, value, "no reward model scores them: r1pipe run stage=reward_model")
    share = sum(score.detail != NOT_SCORABLE for score in scores) / len(scores)
    differ = sum(has_variance(group.rewards) for group in groups) / len(groups)
    value += f"; {share:.0%} of {len(scores)} completions could be scored, {differ:.0%} of groups differ"
    status = context.limits.judgeable.grade(share)
    if status == PASS and not differ:
        return Outcome(WARN, value, "general prompts teach nothing: check the reward models")
    remedy = "answers are cut off or malformed: raise stage.sampling.max_tokens, or start from rejection_sft"
    return Outcome(status, value, remedy)
