"""What a checkpoint was trained on: sources, licences, how samples were drawn, what screening found."""

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
from r1pipe.runs import samples
from r1pipe.runs.files import read_json
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
    lines = [f"responses: {listed(counts['source'])}", f"prompts: {listed(counts['prompt_source'])}"]
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
    """What screening found in all that was learned by imitation or ranking."""
    lines, gaps = list[str](), list[str]()
    by_run = {one.parent.run_id: one for one in subject.trained}
    for run in subject.trained_on:
        if run.kind != "demonstrations":
            continue
        report = read_json(folder_of(by_run[run.run_id]).screening)
        found = report.get(what)
        if not found:
            gaps.append(f"{run.run_id} was not looked over")
            continue
        names = f" ({listed(found['found'])})" if found["rows"] else ""
        action = report["actions"]["identity" if what == "claims" else "personal"]
        lines.append(f"{run.stage}: {found['rows']:,} of {report['rows']:,} rows{names}; action: {action}")
    lines += [
        f"{run.stage}: {kind}"
        for run in subject.trained_on
        for kind in [NOT_SCREENED.get(run.kind)]
        if kind is not None
    ]
    return missing(*subject.unknown, *gaps) if subject.unknown or gaps else answered(lines)


NOT_SCREENED = {
    "documents": "documents of the bundled world, which has neither",
    "rollouts": "its own completions, which are not looked over",
}
