"""The reward models that an all-scenario stage asks: whether they are there, whole, and good enough."""

from pathlib import Path

from r1pipe import checkpoints
from r1pipe.config.schema import PreferenceConfig
from r1pipe.doctor.context import SEED, Context
from r1pipe.findings import ORDER, PASS, WARN, Finding
from r1pipe.rewards.models import HELPFUL, KINDS, RewardModel, judged_tokens, load_reward_model, score_rows
from r1pipe.rewards.quality import auc, pair_accuracy


def quality(context: Context, name: str) -> Finding:
    """Each model on held-out pairs or labels, the worst verdict counting."""
    preference: PreferenceConfig | None = context.config.stage.preference  # type: ignore[attr-defined]
    if preference is None:
        return Finding(name, PASS, "none: rules alone reward this stage")
    parent = context.config.reads_from["reward_model"]
    checkpoints.verify(parent.checkpoint, parent.hash)
    weights = dict(zip(KINDS, (preference.helpful_weight, preference.harmless_weight), strict=True))
    status, told, remedy = PASS, [], ""
    for kind in KINDS:
        if not weights[kind]:
            continue
        if not (Path(parent.checkpoint) / kind).is_dir():
            verdict, shown = WARN, f"{kind}: none"
        else:
            verdict, shown = _judged(context, kind, load_reward_model(Path(parent.checkpoint) / kind))
        status = max(status, verdict, key=ORDER.index)
        told.append(shown)
        if verdict != PASS and not remedy:
            remedy = f"train the {kind} model on more or better data: r1pipe run stage=reward_model"
    return Finding(name, status, "; ".join(told), remedy)


def _judged(context: Context, kind: str, model: RewardModel) -> tuple[str, str]:
    chat, split = context.chat, context.config.stage.eval.split
    longest, n = model.config.max_position_embeddings, context.limits.rows // 10
    if kind == HELPFUL:
        pairs = [
            rows
            for pair in context.data.preference_pairs(split, n, SEED)
            if max(
                map(
                    len,
                    rows := [
                        judged_tokens(kind, chat, pair.prompt, text) for text in (pair.chosen, pair.rejected)
                    ],
                )
            )
            <= longest
        ]
        if not pairs:
            return WARN, f"{kind}: no pairs to judge it on"
        scores = score_rows(model, [row for rows in pairs for row in rows], chat.pad_id)
        right = pair_accuracy(scores[0::2], scores[1::2])
        return context.limits.helpful.grade(right), f"{kind}: {right:.0%} of {len(pairs)} pairs in order"
    labels = context.data.safety_labels(split, n, SEED)
    read = [(judged_tokens(kind, chat, one.prompt, one.response), one.safe) for one in labels]
    read = [(row, safe) for row, safe in read if len(row) <= longest]
    area = auc(score_rows(model, [row for row, _ in read], chat.pad_id), [safe for _, safe in read])
    if area is None:
        return WARN, f"{kind}: no labels to judge it on"
    return context.limits.harmless.grade(
        area
    ), f"{kind}: area under the curve {area:.2f} on {len(read)} labels"
