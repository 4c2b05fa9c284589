"""What a reproduction shows, in a few sentences: for the report, and for MLflow."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, TypeVar

from r1pipe.core.formatting import number, percent
from r1pipe.runs.files import Tail
from r1pipe.runs.results import StoredRun, row

Run = TypeVar("Run", bound=StoredRun)
REINFORCED = ("grpo", "zero")  # the stages whose training the story tells
NOISE = 0.01  # a change of a share that is not told; nor is one by less than two hundredths of it
ENDS = 3  # steps whose mean stands for a training's start, and for its end


def first_seed(runs: Sequence[Run]) -> list[Run]:
    """One run of each stage, without those that measure a benchmark."""
    plain = [run for run in runs if not run.measured]
    lowest = min((run.config.get("seed") or 0 for run in plain), default=0)
    return list({run.stage: run for run in plain if (run.config.get("seed") or 0) == lowest}.values())


def sentences(runs: Sequence[StoredRun]) -> list[str]:
    """What changed from the first stage to the last, and while reinforcement ran; what is not known is left
    out."""
    told = first_seed(runs)
    rows = [row(run) for run in told if not run.is_control]
    found = [_of_stages(rows, "pass_at_1", "pass@1 on held-out problems")]
    beyond = "pass@1 on problems of level 4, which no stage after the base trains on,"
    found.append(_of_stages(rows, "level_4", beyond))
    for run in told:
        if run.stage in REINFORCED:
            found += [_of_training(run), _of_lengths(run)]
    return [sentence for sentence in found if sentence]


def _of_stages(rows: Sequence[dict[str, Any]], key: str, what: str) -> str:
    known = [(each["stage"], each[key]) for each in rows if each.get(key) is not None]
    if len(known) < 2:
        return ""
    (first, before), (last, after) = known[0], known[-1]
    if abs(after - before) < max(NOISE, 0.02 * before):
        return f"{what} stays at {percent(after)} % from {first} to {last}."
    verb = "rises" if after > before else "falls"
    return f"{what} {verb} from {percent(before)} % ({first}) to {percent(after)} % ({last})."


def _of_training(run: StoredRun) -> str:
    """Length, reflection and entropy, at the first and the last steps."""
    lines = Tail(run.folder.metrics).read()
    parts = []
    for name, what, unit, shown in (
        ("completions/mean_length", "the mean response length", " tokens", number),
        ("reflection_rate", "the share of responses that find and mend an error of their own", " %", percent),
        ("entropy", "entropy", " nats per token", number),
    ):
        values = [line[name] for line in lines if isinstance(line.get(name), int | float)]
        if len(values) > 1:
            n = min(ENDS, len(values) // 2)
            parts.append(f"{what} from {shown(fmean(values[:n]))} to {shown(fmean(values[-n:]))}{unit}")
    steps = max((line["step"] for line in lines if isinstance(line.get("step"), int)), default=0)
    return f"In {steps} steps {run.stage} takes {listed(parts)}." if parts else ""


def _of_lengths(run: StoredRun) -> str:
    """How many tokens right answers take."""
    within = row(run)["pass_at_1_within"] or {}
    known = [(int(tokens), share) for tokens, share in within.items() if share is not None]
    if len(known) < 2:
        return ""
    most, best = max(known)
    few, share = next(((n, share) for n, share in sorted(known) if share > best / 2), (most, best))
    right = f"{percent(share)} % are right within {few} tokens, {percent(best)} % within {most}"
    return f"Of {run.stage}'s responses {right}." if few < most else ""


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
