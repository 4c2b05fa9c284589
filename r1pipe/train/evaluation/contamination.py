"""A benchmark's questions in what its checkpoint was trained on, so that a score is not memory.

Searched: the training rows of every data file that a run behind the checkpoint names, the data sets that runs
made (data/*.parquet), and the prompts of reinforcement on generated data (rollouts/). What could not be
searched is said.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.config import STAGE_TYPES, DataConfig, EvaluateConfig, ParentRef
from r1pipe.config.benchmark import BenchmarkConfig
from r1pipe.config.fields import build
from r1pipe.core.errors import ConfigError, DataError
from r1pipe.data import open_data
from r1pipe.data.overlap import matches, user_text
from r1pipe.data.source import Source
from r1pipe.runs import data_files, heartbeat
from r1pipe.runs.lineage.training import MadeBy, made_by

SHOWN = 5  # examples kept
EVERYTHING = 10**9  # rows of a kind


class Text(NamedTuple):
    """Something that was trained on."""

    text: str
    run_id: str
    place: str  # file and row


@dataclass
class Searched:
    """What was found, and where one looked."""

    questions: int
    shares: dict[int, tuple[float, Text]] = field(default_factory=dict)  # question -> most of it in one text
    rows: int = 0
    sources: list[str] = field(default_factory=list)
    unsearched: list[str] = field(default_factory=list)


def search(questions: Sequence[str], start: ParentRef, benchmark: BenchmarkConfig) -> Searched:
    """Look for the questions in all that was trained on behind the checkpoint `start`."""
    found = Searched(len(questions))
    texts = ((text.text, text) for text in _counted(found, start))
    for number, share, text in matches(questions, texts, benchmark.ngram, benchmark.common):
        heartbeat.tick()
        if number not in found.shares or share > found.shares[number][0]:
            found.shares[number] = share, text
    return found


def measured(
    found: Searched, questions: Sequence[str], benchmark: BenchmarkConfig
) -> tuple[dict[str, Any], str]:
    """The part of evaluation.json, and one line for the screen."""
    ordered = sorted(found.shares.items(), key=lambda item: (-item[1][0], item[0]))
    copied = sum(share >= benchmark.covered for share, _ in found.shares.values())
    examples: list[dict[str, Any]] = [
        {"question": questions[number], "share": share, "run_id": text.run_id, "found_in": text.place}
        for number, (share, text) in ordered[:SHOWN]
    ]
    part = {
        "ngram": benchmark.ngram,
        "covered": benchmark.covered,
        "questions": found.questions,
        "copied": copied,
        "overlapping": len(found.shares) - copied,
        "rows": found.rows,
        "searched": found.sources,
        "unsearched": found.unsearched,
        "examples": examples,
    }
    if not found.sources:
        line = "contamination: none of the training data could be searched"
    else:
        line = f"contamination: {copied} of {found.questions} questions are copied in the {found.rows:,} "
        line += f"training rows searched, {part['overlapping']} more share {benchmark.ngram} words in a row"
        if examples:
            line += f"; the first: {examples[0]['found_in']} ({examples[0]['question'][:60]!r})"
    return part, "; ".join([line, *(f"not searched: {reason}" for reason in found.unsearched)])


def _counted(found: Searched, start: ParentRef) -> Iterator[Text]:
    """All texts behind the checkpoint, noted in `found` as they are read."""
    for run in made_by(start):
        if run.problem:
            found.unsearched.append(run.problem)
            continue
        if issubclass(STAGE_TYPES.get(run.stage, EvaluateConfig), EvaluateConfig):
            continue  # it does not train
        for name, texts in _sources(run):
            before = found.rows
            try:
                for text in texts:
                    found.rows += 1
                    yield text
            except (DataError, ConfigError, pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                found.unsearched.append(f"{name} of {run.run_id} ({reason})")
            else:
                found.sources.append(f"{run.run_id}: {found.rows - before:,} rows of {name}")


def _sources(run: MadeBy) -> Iterator[tuple[str, Iterator[Text]]]:
    """What a run was trained on: a name, and its texts, which may raise on the way."""
    data = (run.config or {}).get("data") or {}
    yield f"data={data['name']}" if data else "its data", _of_data(run, data)
    if run.folder is None:
        return
    made = sorted(run.folder.data.glob("*.parquet"))
    if data.get("kind") != "files":  # what was drawn from a generator
        made += sorted(run.folder.rollouts.glob("*.parquet"))
    for path in made:
        yield f"{path.parent.name}/{path.name}", _of_parquet(run, path)


def _of_data(run: MadeBy, data: dict[str, Any]) -> Iterator[Text]:
    """The training rows of a run's files. Raises DataError where they are not to be had, and ConfigError."""
    if not data:
        raise DataError("its record names none")
    if data.get("kind") != "files":
        raise DataError("its problems are generated, and no list of them is kept")
    config = build(DataConfig, data, "data")
    if run.data_hash not in (None, data_files.hashes(data)[0]):
        raise DataError("its files are not those that it read, or not here")
    yield from _rows(run, open_data(replace(config, bad_rows="set_aside", max_bad_rows=1.0), 0))


def _rows(run: MadeBy, source: Source) -> Iterator[Text]:
    """Question and answer of every training row."""
    solved = [row for row in source.rows("train") or [] if row.prompt.question]
    solved += source.general_demonstrations(EVERYTHING, 0, {})
    for row in solved:
        yield Text(f"{user_text(row.prompt)}\n{row.response}", run.run_id, row.source)
    for pair in source.preference_pairs("train", EVERYTHING, 0):
        yield Text(f"{user_text(pair.prompt)}\n{pair.chosen}", run.run_id, f"pair {pair.prompt.id}")


def _of_parquet(run: MadeBy, path: Path) -> Iterator[Text]:
    """Every row's question, with what was said before it, and response; of rollouts each question once. Rows
    that keep no texts are left out: another file has them. Raises ArrowException, OSError."""
    names = [name for name in ("context", "question", "response") if name in pq.read_schema(path).names]
    seen: set[str] = set()
    for number, row in enumerate(pq.read_table(path, columns=names).to_pylist()):
        before = [turn["content"] for turn in json.loads(row.pop("context", None) or "[]")]
        text = "\n".join(filter(None, [*before, *row.values()]))
        if text and text not in seen:
            seen.add(text)
            yield Text(text, run.run_id, f"{path.name}:{number + 1}")
