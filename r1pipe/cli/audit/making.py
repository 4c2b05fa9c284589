"""What made a checkpoint: lineage, code, seeds, optimizers, machine and cost."""

from collections.abc import Callable
from typing import Any

from r1pipe.cli import cost
from r1pipe.cli.audit.subject import Answer, Subject, answered, folder_of, missing, record_of, stage_of
from r1pipe.core.formatting import duration, number
from r1pipe.runs.files import read_json
from r1pipe.runs.lineage.ancestors import Ancestor
from r1pipe.runs.record import code_version


def lineage(subject: Subject) -> Answer:
    broken = [problem for one in subject.lineage for problem in one.problems]
    without = [one.parent.run_id for one in subject.all if one.record is None]
    if broken or without:
        return missing(*broken, *(f"{run_id} has no record" for run_id in without))
    return answered(
        f"{one.edge or 'itself'}: {one.parent.stage}, {one.parent.run_id}, {one.parent.hash[:12]}"
        for one in subject.all
    )


def code(subject: Subject) -> Answer:
    def line_of(one: Ancestor) -> str | None:
        record = record_of(one)
        version = (record.get("versions") or {}).get("r1pipe")
        return code_version(record, 10) or (f"r1pipe {version}" if version else None)

    return of_each(subject, line_of, "the revision of its code")


def seeds(subject: Subject) -> Answer:
    def line_of(one: Ancestor) -> str | None:
        seed = record_of(one).get("seed")
        return None if seed is None else f"seed {seed}"

    return of_each(subject, line_of, "its seed")


def scheduler(subject: Subject) -> Answer:
    def line_of(one: Ancestor) -> str | None:
        optim = stage_of(one).get("optim")
        if not optim:
            return None
        steps = record_of(one).get("steps", 0)
        rates = (
            f"{optim['lr']:g} to {optim['min_lr']:g}, {optim['schedule']}, {optim['warmup_steps']} of warm-up"
        )
        return f"AdamW, {rates}; {steps:,} steps"

    return of_each(subject, line_of, "its optimizer's settings")


def of_each(subject: Subject, line_of: Callable[[Ancestor], str | None], what: str) -> Answer:
    """A line for each run that was trained; missing where one does not have it."""
    lines = [(one, line_of(one)) for one in subject.trained]
    without = [one.parent.run_id for one, line in lines if line is None]
    without += [one.parent.run_id for one in subject.all if one.record is None]
    if without or not lines:
        return missing(f"no record has {what}: {', '.join(without) or subject.own.parent.run_id}")
    return answered(f"{one.parent.stage}: {line}" for one, line in lines)


def machine(subject: Subject) -> Answer:
    env = read_json(folder_of(subject.own).env)
    devices, here = env.get("devices") or {}, env.get("machine") or {}
    if not devices and not here:
        return missing("its run folder has no env.json")
    parts = [f"{devices['count']} x {devices['unit']}"] if devices else []
    return answered([", ".join(parts + [f"{name} {value}" for name, value in here.items() if value])])


def cost_of(subject: Subject) -> Answer:
    root = folder_of(subject.own).path.parent
    inside = [
        one
        for one in subject.trained
        if folder_of(one).path.parent == root and folder_of(one).record.exists()
    ]
    if not inside:
        return missing("it lies in no run folder, so that what else was tried is not known")
    ledger = cost.ledger(root, cost.Rates(None, None, None))

    def spent(line: dict[str, Any]) -> str:
        hours = [f"{number(value)} {name.replace('_', '-')}" for name, value in line["hours"].items()]
        return " + ".join(hours) or "nothing"

    lines = [f"results alone: {spent(ledger['pristine'])}; all runs of {root}: {spent(ledger['true'])}"]
    named = {name: line for name, line in ledger["lines"].items() if line["runs"]}
    lines += [f"{cost.LINES[name]}: {line['runs']} runs, {spent(line)}" for name, line in named.items()]
    elsewhere = [one for one in subject.trained if one not in inside]
    for one in elsewhere:
        seconds = record_of(one).get("wall_s")
        took = f"{duration(seconds)} of its job" if seconds else "not known"
        lines.append(
            f"made elsewhere: {one.parent.stage} {one.parent.run_id}, {took}; what failed there is not known"
        )
    return answered(lines)
