"""What rewarded a checkpoint, how it was measured, and whether it was trained on what it was measured on."""

from r1pipe.cli.audit.subject import (
    Answer,
    Subject,
    answered,
    folder_of,
    listed,
    missing,
    not_applicable,
    record_of,
    stage_of,
    steps_of_funnel,
)
from r1pipe.config import RewardModelConfig
from r1pipe.core.formatting import percent
from r1pipe.runs.files import read_json
from r1pipe.runs.lineage import training_data
from r1pipe.runs.reward_model_quality import describe


def reward_models(subject: Subject) -> Answer:
    stages = subject.reinforced
    if not stages:
        return not_applicable("no reinforcement learning")
    lines, gaps = list[str](), list[str]()
    for one in stages:
        stage = stage_of(one).get("rl") or stage_of(one)  # of a student below stage.rl
        custom = record_of(one).get("rewards") or {}
        if "rewards" not in stage:
            gaps.append(f"{one.parent.run_id} does not say what rewarded it")
            continue
        rules = ", ".join(
            f"{name} {weight:g}" for name, weight in stage["rewards"]["weights"].items() if weight
        )
        lines.append(f"{one.parent.stage}: rules {rules}")
        lines += [
            f"  {name}: {source['source']} {(source['hash'] or '')[:12]}" for name, source in custom.items()
        ]
        if preference := stage.get("preference"):
            weights = [f"{kind} {preference[f'{kind}_weight']:g}" for kind in ("helpful", "harmless")]
            last = preference["last_steps"]
            lines.append(f"  reward models in its last {last} steps: {', '.join(weights)}")
    rows = {run.run_id: run for run in subject.trained_on}
    for one in subject.of_type(RewardModelConfig):
        quality = (record_of(one).get("metrics") or {}).get("reward_models") or {}
        learned = rows[one.parent.run_id]
        lines.append(f"{one.parent.stage}: score heads trained on {listed(learned.counts.get('source', {}))}")
        lines += [f"  {describe(kind, values)}" for kind, values in quality.items()]
        gaps += [] if quality else [f"{one.parent.run_id} has no measured quality"]
    return missing(*gaps) if gaps else answered(lines)


def evaluation(subject: Subject) -> Answer:
    found = subject.metrics
    if found.get("pass_at_1") is None:
        return missing("no reasoning problems were measured")
    interval = found.get("pass_at_1_ci")
    spread = f" (95% {percent(interval[0])} to {percent(interval[1])})" if interval else ""
    config = stage_of(subject.own).get("eval") or {}
    drawn = f"T={config['temperature']:g}, top-p {config['top_p']:g}" if config else "sampling not recorded"
    of = f"data={found.get('data') or 'not recorded'}, split {found.get('split') or 'not recorded'}"
    return answered(
        [
            f"pass@1 {percent(found['pass_at_1'])}%{spread}: {found.get('problems')} problems of {of}, "
            f"{found.get('k')} samples each, {drawn}",
            f"verified by rule; {found.get('unscored', 0)} samples without a verdict",
        ]
    )


def helpfulness(subject: Subject) -> Answer:
    found, scorer = subject.metrics, scored_by(subject)
    if found.get("general_score") is None or scorer is None:
        return missing("general answers were not measured: the data has no one to score them")
    kinds = ", ".join(
        f"{kind} {percent(value)}%"
        for kind, value in (found.get("general_by_kind") or {}).items()
        if value is not None
    )
    return answered(
        [f"{percent(found['general_score'])}% of general answers right ({kinds}), scored by {scorer}"]
        + [
            f"preference score {percent(found['preference_score'])}%"
            for _ in [0]
            if found.get("preference_score")
        ]
    )


def harmlessness(subject: Subject) -> Answer:
    found, scorer = subject.metrics, scored_by(subject)
    shares = {
        "harmful requests refused": found.get("refusal_rate"),
        "harmless ones answered": found.get("safe_answer_rate"),
    }
    if scorer is None or all(share is None for share in shares.values()):
        return missing("answers to safety prompts were not measured")
    shown = ", ".join(f"{name} {percent(share)}%" for name, share in shares.items() if share is not None)
    if found.get("refusal_rate") is None:
        return missing(f"no harmful request was asked; {shown}, scored by {scorer}")
    return answered([f"{shown}, scored by {scorer}"])


def scored_by(subject: Subject) -> str | None:
    """Who scored general answers in its evaluation."""
    return read_json(folder_of(subject.own).evaluated).get("general_scored_by")


def identity(subject: Subject) -> Answer:
    said = subject.metrics.get("identity")
    if not said:
        return missing(
            "it was not asked; `r1pipe eval CHECKPOINT stage.eval.identity=50` asks, and has the answer"
        )
    names = f" ({listed(said['names'])})" if said["names"] else ""
    asked = f"of {said['questions']} answers, {percent(said['other'])}% claim to be another model{names}"
    return answered([f"{asked}, {percent(said['own'])}% give its own name"])


def contamination(subject: Subject) -> Answer:
    evaluated = read_json(folder_of(subject.own).evaluated)
    asked = set(evaluated.get("reasoning", [])) | set(evaluated.get("general", []))
    if not asked:
        return missing("its run does not say which prompts it was measured on")
    if subject.unknown:
        return missing(*subject.unknown)
    trained, seen = set[str](), dict[str, int]()
    for one in subject.trained:
        of_run = training_data.prompt_ids(one)
        trained |= of_run
        seen[one.parent.run_id] = len(of_run & asked)
    both = trained & asked
    lines = [f"{len(both):,} of {len(asked):,} prompts measured on are among {len(trained):,} trained on"]
    lines += [f"  {run_id}: {count:,}" for run_id, count in seen.items() if count]
    for one in subject.trained:
        for step in steps_of_funnel(folder_of(one)):
            if step["name"].startswith("overlap"):
                lines.append(f"{one.parent.stage}: {step['dropped']:,} samples dropped for {step['name']}")
    if any(run.kind == "documents" for run in subject.trained_on):
        lines.append("documents: the world writes them from problems of the train split alone")
    return answered(lines)
