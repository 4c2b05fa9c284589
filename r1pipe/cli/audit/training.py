"""What a checkpoint was trained on: sources, licences, how samples were drawn, what screening found."""

from pathlib import Path
from statistics import fmean

from r1pipe.cli.audit.subject import (
    Answer,
    Subject,
    answered,
    folder_of,
    listed,
    missing,
    not_applicable,
    stage_of,
    steps_of_funnel,
)
from r1pipe.core.formatting import percent
from r1pipe.core.paths import RunFolder
from r1pipe.runs import samples
from r1pipe.runs.files import Tail, read_json
from r1pipe.runs.lineage import training_data
from r1pipe.runs.lineage.ancestors import Ancestor


def data_sources(subject: Subject) -> Answer:
    counts = training_data.shares(subject.trained_on)
    unknown = subject.unknown + [
        f"{counts[name][None]:,} rows have no {name}"
        for name in ("source", "prompt_source")
        if None in counts[name]
    ]
    documents = [run for run in subject.trained_on if run.kind == "documents"]
    if unknown:
        return missing(*unknown)
    parts = {"responses": counts["source"], "prompts": counts["prompt_source"]}
    lines = [f"{name}: {listed(values)}" for name, values in parts.items() if values]
    for run in documents:
        tokens = f"{run.tokens:,} tokens" if run.tokens else "documents"
        lines.append(f"{run.stage}: {tokens} of {', '.join(map(str, run.counts['source']))}")
    return answered(lines)


def licences(subject: Subject) -> Answer:
    found = training_data.licences(subject.trained_on)
    counts = training_data.shares(subject.trained_on)["licence"]
    if None in found or not found:
        rows = f"{counts[None]:,} rows have no known licence" if None in counts else ""
        return missing(*subject.unknown, *filter(None, [rows]))
    return answered([", ".join(map(str, found)), *([listed(counts)] if counts else [])])


def data_samples(subject: Subject) -> Answer:
    if subject.unknown:
        return missing(*subject.unknown)
    lines = []
    by_run = {one.parent.run_id: one for one in subject.trained}
    for run in subject.trained_on:
        folder = folder_of(by_run[run.run_id])
        if run.kind == "documents":
            lines.append(
                f"{run.stage}: written by data={', '.join(map(str, run.counts['source']))} from its seed"
            )
        elif run.kind == "rollouts":
            lines.append(f"{run.stage}: all {run.rows:,} completions, in {folder.rollouts}")
        else:
            path = folder.dataset if folder.dataset.exists() else training_data.dataset_of(folder)
            whole = "all" if path == folder.dataset else f"up to {samples.EXAMPLES} of {run.rows:,}"
            lines.append(f"{run.stage}: texts of {whole} rows, in {path}")
    return answered(lines)


def collection(subject: Subject) -> Answer:
    lines, gaps = list[str](), list[str]()
    by_run = {one.parent.run_id: one for one in subject.trained}
    for run in subject.trained_on:
        drawn = [str(source) for source in run.counts.get("source", {}) if is_drawn(source)]
        if run.kind != "demonstrations" or not drawn:
            continue
        one = by_run[run.run_id]
        stage, sampling = stage_of(one), stage_of(one).get("sampling")
        makers = ", ".join(drawn)
        funnel = steps_of_funnel(folder_of(one))
        if sampling and funnel:
            kept = ", ".join(f"{step['name']} -{step['dropped']:,}" for step in funnel if step["dropped"])
            lines += [
                f"{run.stage}, {makers}: {stage['samples_per_prompt']} each for {stage['prompts']:,} prompts",
                "  T={temperature:g}, top-p {top_p:g}, {max_tokens:,} tokens at most".format(**sampling),
                f"  {funnel[0]['kept']:,} drawn; dropped: {kept or 'none'}",
            ]
        elif run.counts.get("teacher", {}).keys() - {training_data.NONE, None}:
            lines.append(f"{run.stage}: {makers}, asked as its config.json says ({folder_of(one).config})")
        elif data_parents(subject, one):
            lines.append(f"{run.stage}: the samples of {', '.join(data_parents(subject, one))}")
        else:
            gaps.append(f"{run.run_id} does not say how {makers} was sampled")
    if subject.unknown or gaps:
        return missing(*subject.unknown, *gaps)
    return answered(lines) if lines else not_applicable("no response was drawn from a model")


def is_drawn(source: str | None) -> bool:
    return bool(source) and str(source).startswith((samples.SAMPLED, samples.TEACHER))


def data_parents(subject: Subject, one: Ancestor) -> list[str]:
    return [
        other.parent.run_id
        for other in subject.lineage
        if other.edge == "data" and other.child == one.parent.checkpoint
    ]


def teachers_and_judges(subject: Subject) -> Answer:
    counts = training_data.shares(subject.trained_on)
    unknown = [
        f"{rows:,} rows do not say" for name in ("teacher", "judge") if (rows := counts[name].get(None))
    ]
    if subject.unknown or unknown:
        return missing(*subject.unknown, *unknown)
    return answered(f"{name}s: {listed(counts[name]) or 'none'} (rows)" for name in ("teacher", "judge"))


def screened(subject: Subject, what: str) -> Answer:
    """What screening found in all that was learned by imitation or ranking, and in completions."""
    lines, gaps = list[str](), list[str]()
    by_run = {one.parent.run_id: one for one in subject.trained}
    for run in subject.trained_on:
        if run.kind in ("demonstrations", "documents"):
            report = read_json(screening_of(by_run[run.run_id]))
            found = report.get(what)
            if not found:
                gaps.append(f"{run.run_id} was not looked over")
                continue
            names = f" ({listed(found['found'])})" if found["rows"] else ""
            action = report["actions"]["identity" if what == "claims" else "personal"]
            of = "of its first {:,} documents" if run.kind == "documents" else "of {:,} rows"
            lines.append(
                f"{run.stage}: {found['rows']:,} {of.format(report['rows'])}{names}; action: {action}"
            )
        if run.kind == "rollouts" and what == "claims":
            shares = claims_in_rollouts(folder_of(by_run[run.run_id]))
            gaps += [] if shares else [f"{run.run_id}: its completions were not looked over"]
            lines += [f"{run.stage}: {percent(fmean(shares))}% of its completions"] if shares else []
    return missing(*subject.unknown, *gaps) if subject.unknown or gaps else answered(lines)


def screening_of(one: Ancestor) -> Path:
    """What screening found: in its run's folder, or of the bundled base beside its weights."""
    run = folder_of(one)
    return run.screening if run.config.exists() else Path(one.parent.checkpoint) / run.screening.name


def claims_in_rollouts(run: RunFolder) -> list[float]:
    """The share of completions with a claim, step by step."""
    logged = (line.get("completions/identity_claims") for line in Tail(run.metrics).read())
    return [share for share in logged if isinstance(share, int | float)]
