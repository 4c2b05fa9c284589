"""`r1pipe samples`: the best, the worst and the odd completions of a run, on the screen or as JSON.

A stage of reinforcement keeps every step's completions in rollouts/; of other stages there is samples.json,
some held-out prompts with what the stage's last checkpoint answers, right or wrong.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from rich.console import Console
from rich.text import Text
from typing_extensions import TypedDict

from r1pipe.cli.rollouts import SCORE, Filter, Found, look, matching, narrowed, odd_masks, schema_of, whole
from r1pipe.config import STAGE_TYPES
from r1pipe.config.compose import compose
from r1pipe.core.errors import CheckpointError, ConfigError, DataError, nearest
from r1pipe.core.formatting import number
from r1pipe.core.paths import RunFolder
from r1pipe.launch.panel import colour, mask_controls, signed
from r1pipe.runs import lineage
from r1pipe.runs.files import read_object
from r1pipe.runs.results import stored_runs

LONGEST = 3000  # characters of a completion on the screen; JSON has all of it
KINDS = ("best", "worst", "odd")


@dataclass(frozen=True)
class Query:
    """The options of the verb."""

    step: str | None
    rewards: list[str]
    text: str | None
    limit: int  # rows of each kind


def samples(
    name: str, overrides: list[str], query: Query, as_json: bool, console: Console | None = None
) -> None:
    """Show the run's rows. Raises R1pipeError for a run, a step or a filter that is not there."""
    wanted = Filter.of(query.rewards, query.text)
    steps = None if query.step is None else steps_of(query.step)
    run = run_of(name, lineage.SearchPath.of(compose(overrides).config))
    if has_rollouts(run):
        found, rows, source = of_rollouts(run, steps, wanted, query.limit)
    else:
        found, rows, source = of_held_out(run, steps, wanted, query.limit)
    if as_json:
        for row in rows:
            print(json.dumps({"run": run.run_id, **row}, ensure_ascii=False))
    else:
        show(f"{run.run_id}: {source}", found, rows, console or Console(highlight=False))


@with_config(ConfigDict(extra="allow"))
class Sample(TypedDict):
    """A row of samples.json, as far as it is needed here."""

    question: str
    completion: str
    correct: float | bool | None  # None: the verifier failed; a general answer may be right in part


SAMPLES = TypeAdapter(list[Sample])


# --- which run, which steps


def run_of(name: str, place: lineage.SearchPath) -> RunFolder:
    """A run id, a run's folder, or a stage: its newest run in this pipeline that has something to show.

    The run may be unfinished. Raises CheckpointError.
    """
    for path in (place.root / name, Path(name)):
        if lineage.is_run(path):
            return RunFolder(path.resolve())
    known = stored_runs(place.root)
    if name not in STAGE_TYPES:
        names = [*STAGE_TYPES, *(run.folder.run_id for run in known)]
        raise CheckpointError(f"no run {name} under {place.root}; {nearest(name, names)}")
    of_stage = [run for run in known if run.stage == name]
    in_pipeline = [run.folder for run in of_stage if run.config.get("pipeline") == place.pipeline]
    if not in_pipeline:
        others = sorted({str(run.config.get("pipeline")) for run in of_stage})
        hint = f"; other pipelines have one: pipeline={others[0]}" if others else ""
        raise CheckpointError(
            f"stage {name} has no run in pipeline {place.pipeline} under {place.root}; give a run id, a path "
            f"or root=DIR{hint}"
        )
    return max(in_pipeline, key=lambda run: (has_something(run), run.config.stat().st_mtime))


def has_rollouts(run: RunFolder) -> bool:
    return any(run.rollouts.glob("step-*.parquet"))


def has_something(run: RunFolder) -> bool:
    return has_rollouts(run) or run.samples.exists()


def steps_of(words: str) -> range:
    """`7`, or `10-20` with both ends. Raises ConfigError."""
    first, dash, last = words.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ConfigError(f"--step {words} is neither a step nor a range of steps; write 7 or 10-20")
    steps = range(int(first), int(last if dash else first) + 1)
    if not steps:
        raise ConfigError(f"--step {words} ends before it begins; write {last}-{first}")
    return steps


# --- their rows

Rows = list[dict[str, Any]]


def of_rollouts(run: RunFolder, steps: range | None, wanted: Filter, limit: int) -> tuple[Found, Rows, str]:
    """The matches in rollouts/, the rows to show, and their source."""
    files = {int(path.stem.removeprefix("step-")): path for path in run.rollouts.glob("step-*.parquet")}
    there = _span(files)
    if steps is not None:
        files = {step: path for step, path in files.items() if step in steps}
        if not files:
            raise ConfigError(f"no {_span(steps)}: {run.run_id} has rollouts of {there}")
    found = look(files, wanted, limit, repetition_limit(run))
    chosen = chosen_of(found, limit)
    texts = whole(files, [(row["step"], row["row"]) for _, row, _ in chosen])
    rows = [
        {"kind": kind, "odd": reasons, "step": row["step"], **as_row(texts[row["step"], row["row"]])}
        for kind, row, reasons in chosen
    ]
    return found, rows, f"rollouts of {_span(files)}"


def of_held_out(run: RunFolder, steps: range | None, wanted: Filter, limit: int) -> tuple[Found, Rows, str]:
    """The same for samples.json: a right answer counts as 1, a wrong one as 0."""
    if not run.samples.exists():
        raise DataError(
            f"{run.run_id} has nothing to show yet: no rollouts, nor the samples.json of a run's end"
        )
    if steps is not None:
        raise ConfigError(
            f"no {_span(steps)}: {run.run_id} has no rollouts, and samples.json is from its end"
        )
    for name, _ in wanted.rewards:
        if name not in ("", "accuracy"):
            raise ConfigError(f"--reward {name}: samples.json has accuracy only")
    rows = [as_rollout(sample) for sample in read_samples(run.samples)]
    table = pa.Table.from_pylist([row | {f"{SCORE}accuracy": row["reward"]} for row in rows], schema_of([]))
    for column, values in (("step", [0] * len(rows)), ("row", list(range(len(rows))))):
        table = table.append_column(column, pa.array(values, pa.int64()))
    found = narrowed(matching(table, wanted), limit, odd_masks(1.0))
    found.counts["read"] = len(rows)
    shown = [
        {"kind": kind, "odd": reasons, **as_row(rows[row["row"]])}
        for kind, row, reasons in chosen_of(found, limit)
    ]
    return found, shown, "held-out prompts after its last step (samples.json: the stage makes no rollouts)"


def repetition_limit(run: RunFolder) -> float:
    """The share of repeated n-grams at which the run's tripwire trips. Raises CheckpointError."""
    try:
        return float(read_object(run.config)["tripwires"]["wires"]["repetition"]["limit"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{run.config}: tripwires.wires.repetition.limit is missing or not a number; copy the run again"
        ) from None


def read_samples(path: Path) -> list[Sample]:
    """Raises DataError naming the file."""
    try:
        return SAMPLES.validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}); copy it again") from None


def as_rollout(sample: Sample) -> dict[str, Any]:
    """A held-out sample as a row of rollouts: a right answer earns 1."""
    if sample["correct"] is None:
        return {**sample, "reward": None, "advantage": None, "failed": "the verifier gave no verdict"}
    return {**sample, "reward": float(sample["correct"]), "advantage": None}


def chosen_of(found: Found, limit: int) -> list[tuple[str, dict, list[str]]]:
    """The rows to show, each once, under its kind and with the reasons why it is odd.

    Of few rows half are the best, half the worst. The odd ones take turns by reason, so that a frequent one
    does not hide the others.
    """
    few = len({_place(row) for row in [*found.best, *found.worst]})
    longest = max(map(len, found.odd.values()), default=0)
    turns = [rows[i] for i in range(longest) for rows in found.odd.values() if i < len(rows)]
    chosen: list[tuple[str, dict, list[str]]] = []
    shown: set[tuple] = set()
    for kind, rows in zip(KINDS, (found.best[: (few + 1) // 2], found.worst, turns), strict=True):
        new = list({_place(row): row for row in rows if _place(row) not in shown}.values())[:limit]
        shown |= {_place(row) for row in new}
        chosen += [(kind, row, [reason for reason in found.odd if row[reason]]) for row in new]
    return chosen


def _place(row: dict) -> tuple:
    return row["step"], row["row"]


def as_row(row: dict) -> dict:
    """A row of the file with its reward's components under `scores`; what has no value is null."""
    plain = {name: value for name, value in row.items() if not name.startswith(SCORE)}
    scores = {
        name.removeprefix(SCORE): value
        for name, value in row.items()
        if name.startswith(SCORE) and value is not None and not math.isnan(value)  # NaN: in older files
    }
    return {**plain, "scores": scores}


def _span(steps: Iterable[int]) -> str:
    """step 3, steps 1-20"""
    first, last = min(steps), max(steps)
    return f"step {first}" if first == last else f"steps {first}-{last}"


# --- on the screen


def show(title: str, found: Found, rows: Rows, console: Console) -> None:
    """The rows by kind, coloured by their advantage; without a terminal as plain lines, none broken."""
    counts = found.counts
    console.print(Text(f"{title}; {counts['read']:,} completions, {counts['matching']:,} match", "bold"))
    counted = [f"{counts[reason]:,} {reason}" for reason in found.odd if counts[reason]]
    if counted:
        console.print(Text(f"odd: {', '.join(counted)}", "dim"), soft_wrap=not console.is_terminal)
    before = ""
    for row in rows:
        if row["kind"] != before:
            before = row["kind"]
            console.print(Text(f"\n{before}", "bold underline"))
        for line in lines_of(row):
            console.print(line, soft_wrap=not console.is_terminal)


def lines_of(row: dict) -> Iterator[Text]:
    """One completion: what it earned, why it is odd, the prompt, the gold answer, the text."""
    style = colour(row.get("advantage"))
    parts = [f"step {row['step']}" if "step" in row else "", str(row.get("task", ""))]
    if "step" in row:
        parts += [f"reward {number(row['reward'])}", f"advantage {signed(row['advantage'])}"]
        parts += [f"{name} {number(value)}" for name, value in row["scores"].items()]
        parts += [f"{row['length']:,} tokens"]
    else:
        parts += ["not judged" if row["correct"] is None else "right" if row["correct"] else "wrong"]
    parts += ["cut off"] if row.get("truncated") else []
    yield Text("  ".join(filter(None, parts)), f"bold {style}".strip())
    if row["odd"]:
        yield Text(f"odd: {', '.join(row['odd'])}", "yellow")
    if row.get("failed"):
        yield Text(mask_controls(f"failed: {row['failed']}"), "yellow")
    yield Text(mask_controls(f"prompt: {row['question']}"), "italic")
    if row.get("answer"):
        yield Text(mask_controls(f"answer: {row['answer']}"), "dim")
    yield Text(mask_controls(without_middle(row["completion"])) + "\n", style)


def without_middle(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    left_out = f"\n… {len(text) - 2 * half:,} characters left out; --json has all …\n"
    return f"{text[:half]}{left_out}{text[-half:]}"
