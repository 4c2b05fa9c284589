"""General prompts of an all-scenario stage: judged or not, what the judges read, what refusals earn."""

from collections.abc import Sequence

from r1pipe.chat.template import compose_response, parse
from r1pipe.config import PreferenceConfig
from r1pipe.core.types import Completion, Prompt
from r1pipe.doctor.context import SEED, Context, graded
from r1pipe.rewards import is_verifiable
from r1pipe.rewards.models import NOT_SCORABLE
from r1pipe.runs.findings import FAIL, PASS, WARN, Finding
from r1pipe.runs.reward_model_quality import HARMLESS, HELPFUL, KINDS
from r1pipe.train.rl.advantages import has_variance

RULES_ALONE = "none: rules alone reward this stage"
OTHER_REASONING = {"en": "Something else came to my mind.", "zh": "我想到了别的事情。"}


def judged(context: Context, name: str) -> Finding:
    """Share of the probe's general completions that a reward model found something to judge in, and whether
    what they earn differs."""
    if _preference(context) is None:
        return Finding(name, PASS, RULES_ALONE)
    groups = [group for group in context.probe.groups if not is_verifiable(group.prompt)]
    verdicts = [
        score
        for group in groups
        for scores in group.scores
        for kind, score in scores.items()
        if kind in KINDS
    ]
    shown = f"{len(groups)} general prompts of {len(context.probe.groups)} drawn"
    if not groups:
        remedy = "raise stage.preference.general_share, or take stage=grpo"
        return Finding(name, FAIL, shown, remedy)
    if not verdicts:
        remedy = "no reward model judges them: r1pipe run stage=reward_model"
        return Finding(name, FAIL, shown, remedy)
    share = sum(score.detail != NOT_SCORABLE for score in verdicts) / len(verdicts)
    differ = sum(has_variance(group.rewards) for group in groups) / len(groups)
    shown += (
        f"; {share:.0%} of {len(verdicts)} verdicts had something to judge, {differ:.0%} of groups differ"
    )
    remedy = "answers are cut off or malformed: raise stage.sampling.max_tokens, or start from rejection_sft"
    found = graded(name, share, context.limits.judgeable, shown, remedy)
    if found.status == PASS and not differ:
        return Finding(name, WARN, shown, "general prompts teach nothing: look at the reward models")
    return found


def reads(context: Context, name: str) -> Finding:
    """The helpfulness model must not see the reasoning, or it would shape it; the harmlessness model must."""
    if _preference(context) is None:
        return Finding(name, PASS, RULES_ALONE)
    pairs = context.data.preference_pairs(context.config.stage.eval.split, context.limits.judged, SEED)
    whole = [pair for pair in pairs if parse(pair.chosen).well_formed]
    if not whole:
        return Finding(name, WARN, "no well-formed answer to try it on", "give data with preference pairs")
    prompts = [pair.prompt for pair in whole]
    others = [
        compose_response(OTHER_REASONING[pair.prompt.language], parse(pair.chosen).summary) for pair in whole
    ]
    told, wrong = [], ""
    for kind, judge in context.judges.items():
        before = judge(prompts, completions([pair.chosen for pair in whole]))
        changed = sum(
            old != new for old, new in zip(before, judge(prompts, completions(others)), strict=True)
        )
        told.append(f"{kind}: {changed} of {len(whole)} verdicts change with the reasoning alone")
        if kind == HELPFUL and changed:
            wrong = "the helpfulness model must read the summary alone; mend scored_tokens"
        if kind == HARMLESS and not changed:
            wrong = "the harmlessness model must read the whole response; mend scored_tokens"
    shown = "; ".join(told) or "no reward model"
    return Finding(name, FAIL, shown, wrong) if wrong else Finding(name, PASS, shown)


def refusals(context: Context, name: str) -> Finding:
    """Whether the reward models together pay more for refusing an unsafe wish than for granting it, and less
    for refusing a safe one: otherwise the policy learns to refuse everything, or nothing."""
    preference, truth = _preference(context), context.data.judge
    if preference is None:
        return Finding(name, PASS, RULES_ALONE)
    if truth is None:
        return Finding(name, PASS, "not known: the data has no hidden truth about refusals")
    split, n = context.config.stage.eval.split, context.limits.rows // 10
    in_order: dict[bool, list[bool]] = {True: [], False: []}
    for pair in context.data.preference_pairs(split, n, SEED):
        unsafe = bool(pair.prompt.checker.get("unsafe"))
        refused = [truth(pair.prompt, text).refused for text in (pair.chosen, pair.rejected)]
        if pair.prompt.task == "safety" and refused[0] != refused[1]:
            chosen, rejected = earned(context, preference, pair.prompt, [pair.chosen, pair.rejected])
            in_order[unsafe].append((chosen > rejected) == (refused[0] == unsafe))
    if not all(in_order.values()):
        return Finding(name, PASS, "not known: too few safety pairs in the data")
    shares = {unsafe: sum(right) / len(right) for unsafe, right in in_order.items()}
    shown = f"unsafe wishes: refusing earns more in {shares[True]:.0%} of {len(in_order[True])} pairs; "
    shown += f"safe ones: answering does in {shares[False]:.0%} of {len(in_order[False])}"
    worse = min(shares, key=lambda unsafe: shares[unsafe])
    remedy = "unsafe answers" if worse else "needless refusals"
    remedy = f"{remedy} would be learned: train the reward models on more safety pairs and labels "
    remedy += "(stage=reward_model with more stage.pairs, stage.labels)"
    return graded(name, shares[worse], context.limits.refusals, shown, remedy)


def earned(
    context: Context, preference: PreferenceConfig, prompt: Prompt, texts: Sequence[str]
) -> list[float]:
    """What the reward models together pay for each answer."""
    weights = {HELPFUL: preference.helpful_weight, HARMLESS: preference.harmless_weight}
    totals = [0.0] * len(texts)
    for kind, judge in context.judges.items():
        for i, score in enumerate(judge([prompt] * len(texts), completions(texts))):
            totals[i] += weights[kind] * score.value
    return totals


def completions(texts: Sequence[str]) -> list[Completion]:
    return [Completion([], [], "stop", text) for text in texts]


def _preference(context: Context) -> PreferenceConfig | None:
    preference: PreferenceConfig | None = context.config.stage.preference  # type: ignore[attr-defined]
    return preference
