"""The best, worst and odd rows of a run's rollouts/step-N.parquet.

All files are one pyarrow dataset. Only its numeric columns are held in memory; the texts of the few rows that
are shown are read last.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from r1pipe.core.errors import ConfigError, DataError, nearest

SCORE = "score_"  # + the name of a reward: its column
NUMBERS = {
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "truncated": pa.bool_(),
    "repetition": pa.float64(),
    "failed": pa.string(),
}
ODD_SCORES = ("accuracy", "format", "language")  # the rewards that `odd_masks` uses
TEXTS = ("question", "completion")
HAS_TEXT = "has_text"
SAME = 1e-6  # rounding of rewards, which are weighted sums
BOUND = re.compile(r"(?P<name>[a-z]\w*)?\s*(?P<sign><=|>=|<|>|=)?\s*(?P<value>[-+.\de]+)")

Mask = Callable[[pa.Table], pa.ChunkedArray]
T = TypeVar("T")


@dataclass(frozen=True)
class Filter:
    """Conditions on rows."""

    rewards: Sequence[tuple[str, pc.Expression]] = ()  # a reward's name ("" for the sum) and its bound
    text: pc.Expression | None = None

    @classmethod
    def of(cls, rewards: Iterable[str], text: str | None) -> "Filter":
        """From the words of the command line. Raises ConfigError."""
        return cls([bound(words) for words in rewards], None if text is None else searched(text))


def bound(words: str) -> tuple[str, pc.Expression]:
    """`>=1`, `accuracy=0`, `0.5..1`, `format<1`: a reward's name, "" for the sum, and its condition.

    Raises ConfigError.
    """
    match = BOUND.fullmatch(words.strip())
    wrong = ConfigError(f"--reward {words} is not a bound; write '>=1', 0.5..1, accuracy=0 or 'format<1'")
    if not match or (match["name"] and not match["sign"]):
        raise wrong
    name, sign = match["name"] or "", match["sign"] or "="
    low, dots, high = match["value"].partition("..")
    try:
        least, most = (float(value) if value else None for value in (low, high if dots else low))
    except ValueError:
        raise wrong from None
    if (least is None and most is None) or (dots and sign != "="):
        raise wrong
    value = pc.field(SCORE + name if name else "reward")
    holds = pc.scalar(True)
    if least is not None and sign not in ("<", "<="):
        holds &= value > least + SAME if sign == ">" else value >= least - SAME
    if most is not None and sign not in (">", ">="):
        holds &= value < most - SAME if sign == "<" else value <= most + SAME
    return name, holds


def searched(text: str) -> pc.Expression:
    """Rows whose question or completion contains the text, in any case, or matches `/a regular expression/`.

    Raises ConfigError.
    """
    is_pattern = len(text) > 2 and text[0] == text[-1] == "/"
    match, wanted = (pc.match_substring_regex, text[1:-1]) if is_pattern else (pc.match_substring, text)
    try:
        match(pa.array([""]), pattern=wanted)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"--text {text} is not a regular expression: {error}") from None
    question, completion = (
        match(pc.field(name), pattern=wanted, ignore_case=not is_pattern) for name in TEXTS
    )
    return question | completion


# --- odd rows: a positive advantage means that a completion did better than its group


def odd_masks(much_repetition: float) -> dict[str, Mask]:
    """Reason -> the rows that are odd for it; `much_repetition` is a share of repeated 4-grams."""

    def rewarded_though(mask: Mask) -> Mask:
        return lambda table: pc.and_(pc.greater(table["advantage"], 0.0), mask(table))

    return {
        "not judged": lambda table: pc.is_valid(table["failed"]),
        "rewarded though cut off": rewarded_though(lambda table: table["truncated"]),
        "rewarded though badly formed": rewarded_though(lambda table: pc.less(table[SCORE + "format"], 0.5)),
        "rewarded though in another language": rewarded_though(
            lambda table: pc.less(table[SCORE + "language"], 0.5)
        ),
        "rewarded though it repeats itself": rewarded_though(
            lambda table: pc.greater(table["repetition"], much_repetition)
        ),
        "punished though right": lambda table: pc.and_(
            pc.less(table["advantage"], 0.0), pc.greater_equal(table[SCORE + "accuracy"], 1.0)
        ),
    }


# --- reading


@dataclass
class Found:
    """The rows that may be shown, without their texts, and counts."""

    best: list[dict] = field(default_factory=list)  # best first, at most `limit`
    worst: list[dict] = field(default_factory=list)  # worst first
    odd: dict[str, list[dict]] = field(default_factory=dict)  # by reason, the largest advantage first
    counts: Counter = field(default_factory=Counter)  # "read", "matching", and every reason


BEST = [("reward", "descending"), ("advantage", "descending"), ("step", "descending"), ("row", "ascending")]
WORST = [("reward", "ascending"), ("advantage", "ascending"), ("step", "descending"), ("row", "ascending")]
LARGEST = [("size", "descending"), ("step", "descending"), ("row", "ascending")]


def look(files: dict[int, Path], wanted: Filter, limit: int, much_repetition: float) -> Found:
    """The best, worst and odd rows of some steps' files. Raises DataError, ConfigError."""
    footers = {step: _read(path, pq.read_metadata) for step, path in files.items()}
    columns = {name for footer in footers.values() for name in footer.schema.names}
    rewards = {name.removeprefix(SCORE) for name in columns if name.startswith(SCORE)}
    for name, _ in wanted.rewards:
        if name and name not in rewards:
            raise ConfigError(f"--reward {name}: there is no such reward; {nearest(name, rewards)}")
    table = numbers(files, schema_of(rewards), wanted.text)
    counts = [footers[step].num_rows for step in files]
    table = table.append_column("step", pa.array(np.repeat(list(files), counts)))
    table = table.append_column("row", pa.array(np.concatenate([np.arange(count) for count in counts])))
    found = narrowed(matching(table, wanted), limit, odd_masks(much_repetition))
    found.counts["read"] = len(table)
    return found


def schema_of(rewards: Iterable[str]) -> pa.Schema:
    """One schema for all files: older ones lack a column, or have no type for one that is all null."""
    scores = {SCORE + name: pa.float64() for name in sorted({*rewards, *ODD_SCORES})}
    return pa.schema({**NUMBERS, **scores, **dict.fromkeys(TEXTS, pa.string())})


def numbers(files: dict[int, Path], schema: pa.Schema, text: pc.Expression | None) -> pa.Table:
    """Every row's numbers, in the files' order; `has_text`: whether the row matches `text`."""
    dataset = ds.dataset([str(path) for path in files.values()], schema, format="parquet")
    columns = {name: ds.field(name) for name in schema.names if name not in TEXTS}
    if text is not None:
        columns[HAS_TEXT] = text
    try:
        return dataset.to_table(columns)
    except (pa.ArrowInvalid, OSError):
        for path in files.values():  # the error does not always name its file
            _read(path, pq.read_table)
        raise


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Read a file. Raises DataError if it is truncated or not parquet."""
    try:
        return read(path)
    except (pa.ArrowInvalid, OSError) as error:
        why = str(error).splitlines()[0]
        raise DataError(
            f"{path} cannot be read ({why}); a kill may have cut it off: remove it, or leave its step out "
            "with --step"
        ) from None


def matching(table: pa.Table, wanted: Filter) -> pa.Table:
    for _, holds in wanted.rewards:
        table = table.filter(holds)
    if wanted.text is None:
        return table
    return table.filter(ds.field(HAS_TEXT) if HAS_TEXT in table.column_names else wanted.text)


def narrowed(table: pa.Table, limit: int, reasons: dict[str, Mask]) -> Found:
    """The best, worst and odd rows of a table."""
    for reason, mask in reasons.items():
        table = table.append_column(reason, pc.fill_null(mask(table), False))
    scored = table.filter(pc.is_valid(table["reward"]))
    found = Found(rows_by(scored, BEST, limit), rows_by(scored, WORST, limit))
    found.counts["matching"] = len(table)
    for reason in reasons:
        odd = table.filter(table[reason])
        found.counts[reason] = len(odd)
        odd = odd.append_column("size", pc.abs(odd["advantage"]))
        found.odd[reason] = rows_by(odd, LARGEST, limit)
    return found


def rows_by(table: pa.Table, order: list[tuple[str, str]], limit: int) -> list[dict]:
    return table.take(pc.sort_indices(table, sort_keys=order)[:limit]).to_pylist()


def whole(files: dict[int, Path], places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], dict]:
    """(step, row) -> all columns of the row."""
    rows_of: dict[int, list[int]] = {}
    for step, row in places:
        rows_of.setdefault(step, []).append(row)
    all_rows: dict[tuple[int, int], dict] = {}
    for step, rows in rows_of.items():
        taken = _read(files[step], lambda path: ds.dataset(path)).take(rows).to_pylist()
        all_rows |= {(step, row): values for row, values in zip(rows, taken, strict=True)}
    return all_rows
