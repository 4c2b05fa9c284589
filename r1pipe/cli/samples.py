"""`r1pipe samples`: the best, the worst and the odd completions of a run, on the screen or as JSON.

A stage of reinforcement keeps every step's completions in rollouts/; of other stages there is samples.json,
some held-out prompts with what the stage's last checkpoint answers, right or wrong.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NotRequired

import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from rich.console import Console
from rich.text import Text
from typing_extensions import TypedDict

from r1pipe.cli.rollouts import SCORE, Query, look, narrowed, numbers, odd_rows, place, schema_of, whole
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
Rows = list[dict[str, Any]]
Counts = dict[str, int]


def samples(
    name: str, overrides: list[str], query: Query, as_json: bool, console: Console | None = None
) -> None:
    """Show the run's rows. Raises R1pipeError for a run, a step or a filter that is not there."""
    run = run_of(name, lineage.SearchPath.of(compose(overrides).config))
    counts, rows, source = of_rollouts(run, query) if has_rollouts(run) else of_held_out(run, query)
    if as_json:
        for row in rows:
            print(json.dumps({"run": run.run_id, **row}, ensure_ascii=False))
    else:
        show(f"{run.run_id}: {source}", counts, rows, console or Console(highlight=False))


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

    def preference(run: RunFolder) -> tuple[bool, float]:
        return has_rollouts(run) or run.samples.exists(), run.config.stat().st_mtime

    return max(in_pipeline, key=preference)


def has_rollouts(run: RunFolder) -> bool:
    return any(run.rollouts.glob("step-*.parquet"))


# --- their rows


def of_rollouts(run: RunFolder, query: Query) -> tuple[Counts, Rows, str]:
    """Counts of the matches in rollouts/, the rows to show, and their source."""
    files = {int(path.stem.removeprefix("step-")): path for path in run.rollouts.glob("step-*.parquet")}
    there = _span(files)
    if query.steps is not None:
        files = {step: path for step, path in files.items() if step in query.steps}
        if not files:
            raise ConfigError(f"no {_span(query.steps)}: {run.run_id} has rollouts of {there}")
    try:
        much_repetition = float(read_object(run.config)["tripwires"]["wires"]["repetition"]["limit"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{run.config}: tripwires.wires.repetition.limit is missing or not a number; copy the run again"
        ) from None
    found = look(files, query, much_repetition)
    texts = whole(files, [place(row) for _, row, _ in found.rows])
    rows = [
        {"kind": kind, "odd": reasons, "step": row["step"], **as_row(texts[place(row)])}
        for kind, row, reasons in found.rows
    ]
    return found.counts, rows, f"rollouts of {_span(files)}"


@with_config(ConfigDict(extra="allow"))
class Sample(TypedDict):
    """A row of samples.json, as far as it is needed here."""

    question: str
    completion: str
    correct: float | bool | None  # None: the verifier failed; a general answer may be right in part
    context: NotRequired[list[dict[str, str]]]  # messages before the question: role, content


SAMPLES = TypeAdapter(list[Sample])


def of_held_out(run: RunFolder, query: Query) -> tuple[Counts, Rows, str]:
    """The same for samples.json: a right answer counts as 1, a wrong one as 0."""
    if not run.samples.exists():
        raise DataError(
            f"{run.run_id} has nothing to show yet: no rollouts, nor the samples.json of a run's end"
        )
    if query.steps is not None:
        raise ConfigError(
            f"no {_span(query.steps)}: {run.run_id} has no rollouts, and samples.json is from its end"
        )
    for name, _ in query.rewards:
        if name not in ("", "accuracy"):
            raise ConfigError(f"--reward {name}: samples.json has accuracy only")
    try:
        held_out = SAMPLES.validate_json(run.samples.read_bytes())
    except (ValidationError, OSError) as error:
        why = str(error).splitlines()[0]
        raise DataError(f"{run.samples} cannot be read ({why}); copy it again") from None
    rows: Rows = []
    for sample in held_out:
        correct = sample["correct"]
        earned = {"reward": None if correct is None else float(correct), "advantage": None}
        failed = {"failed": "the verifier gave no verdict"} if correct is None else {}
        rows.append({**sample, **earned, **failed})
    table = pa.Table.from_pylist([row | {f"{SCORE}accuracy": row["reward"]} for row in rows], schema_of([]))
    reasons = odd_rows(much_repetition=1.0)
    found = narrowed(numbers(ds.dataset(table), 0, query.text, reasons), query, reasons)
    shown = [{"kind": kind, "odd": odd, **as_row(rows[row["row"]])} for kind, row, odd in found.rows]
    source = "held-out prompts after its last step (samples.json: the stage makes no rollouts)"
    return found.counts, shown, source


def as_row(row: dict) -> dict:
    """A row of the file with its reward's components under `scores`; what has no value is null."""
    plain = {name: value for name, value in row.items() if not name.startswith(SCORE)}
    context = plain.pop("context", None)
    if context:  # in rollouts as JSON, in samples.json as it is
        plain["context"] = json.loads(context) if isinstance(context, str) else context
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


def show(title: str, counts: Counts, rows: Rows, console: Console) -> None:
    """The rows by kind, coloured by their advantage; without a terminal as plain lines, none broken."""
    read, matching, *reasons = counts.items()
    console.print(Text(f"{title}; {read[1]:,} completions, {matching[1]:,} match", "bold"))
    odd = [f"{count:,} {reason}" for reason, count in reasons if count]
    if odd:
        console.print(Text(f"odd: {', '.join(odd)}", "dim"), soft_wrap=not console.is_terminal)
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
    for message in row.get("context") or []:
        yield Text(mask_controls(f"{message['role']}: {message['content']}"), "italic")
    yield Text(mask_controls(f"prompt: {row['question']}"), "italic")
    if row.get("answer"):
        yield Text(mask_controls(f"answer: {row['answer']}"), "dim")
    text = row["completion"]
    if len(text) > LONGEST:
        half = LONGEST // 2
        left_out = f"\n… {len(text) - 2 * half:,} characters left out; --json has all …\n"
        text = f"{text[:half]}{left_out}{text[-half:]}"
    yield Text(mask_controls(text) + "\n", style)
