"""The reward models that an all-scenario stage asks: whether they are there, whole, and good enough."""

from pathlib import Path

from r1pipe.config import PreferenceConfig
from r1pipe.doctor.context import SEED, Context
from r1pipe.rewards.models import RewardModel, load_reward_model
from r1pipe.runs import checkpoints
from r1pipe.runs import reward_model_quality as judges
from r1pipe.runs.findings import FAIL, ORDER, PASS, WARN, Finding
from r1pipe.train.rl.preference import items, standing


def quality(context: Context, name: str) -> Finding:
    """Each model on held-out pairs or labels of this stage's data, by the stage's own bounds.

    The worst verdict counts; what is forced or near a bound is a warning.
    """
    preference: PreferenceConfig | None = context.config.stage.preference  # type: ignore[attr-defined]
    if preference is None:
        return Finding(name, PASS, "none: rules alone reward this stage")
    parent = context.config.reads_from[judges.STAGE]
    checkpoints.verify(parent.checkpoint, parent.hash)
    status, told, remedy = PASS, [], ""
    for kind in judges.requested_kinds(preference):
        folder = Path(parent.checkpoint) / kind
        if not folder.is_dir():
            verdict, shown = FAIL, f"{kind}: none"
            beyond = f"the stage refuses to start (stage.preference.{kind}_weight=0 goes without it): "
        else:
            verdict, shown, beyond = _judged(context, kind, load_reward_model(folder), preference)
        status = max(status, verdict, key=ORDER.index)
        told.append(shown)
        if verdict != PASS and not remedy:
            remedy = f"{beyond}train the {kind} model on more or better data: r1pipe run stage={judges.STAGE}"
    return Finding(name, status, "; ".join(told), remedy)


def _judged(
    context: Context, kind: str, model: RewardModel, preference: PreferenceConfig
) -> tuple[str, str, str]:
    """Verdict, what was measured, and what is beyond a bound."""
    drawn = (context.config.stage.eval.split, context.limits.rows // 10, SEED)
    longest = model.config.max_position_embeddings
    held_out = [one for one in items(kind, context.data, context.chat, drawn) if len(one) <= longest]
    if not held_out:
        return WARN, f"{kind}: no held-out examples to judge it on", ""
    measured, _ = standing(model, kind, held_out, context.chat.pad_id)
    shown = judges.describe(kind, measured)
    if beyond := judges.shortfalls(kind, measured, preference):
        return (WARN if preference.force else FAIL), shown, f"{'; '.join(beyond)}: "
    near = judges.shortfalls(kind, measured, preference, context.limits.judges_margin)
    return (WARN, shown, f"near its bound ({'; '.join(near)}): ") if near else (PASS, shown, "")
