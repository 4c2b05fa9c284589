"""The rows of a run's rollouts/step-N.parquet that a filter keeps, read lazily.

Each file is read by itself: first the columns of numbers, then, only where rows are left and a text is looked
for, those of text; and of what is left no more than could be among the best, the worst and the odd. The texts
of the few rows that are shown come last.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1pipe.core.errors import ConfigError, DataError, nearest

SCORE = "score_"  # + the name of a reward: its column
NUMBERS = ("reward", "advantage", "truncated", "repetition", "failed")
TEXTS = ("question", "completion")
SAME = 1e-6  # rewards are sums of weighted scores: a difference below this is rounding
READERS = 4  # files at once
HEAP, FILES = 100_000, 500  # rows, and files, that are looked at together
BOUND = re.compile(r"(?P<name>[a-z]\w*)?\s*(?P<sign><=|>=|<|>|=)?\s*(?P<value>[-+.\de]+)")

Mask = Callable[[pa.Table], pa.ChunkedArray]


@dataclass(frozen=True)
class Filter:
    """What a row must be to be looked at."""

    rewards: Sequence[tuple[str, pc.Expression]] = ()  # a reward's name ("" for the sum), and its bound
    text: pc.Expression | None = None

    @classmethod
    def of(cls, rewards: Iterable[str], text: str | None) -> "Filter":
        """From the words of the command line. Raises ConfigError."""
        return cls([bound(words) for words in rewards], None if text is None else searched(text))


def bound(words: str) -> tuple[str, pc.Expression]:
    """`>=1`, `accuracy=0`, `0.5..1`, `format<1`: a reward's name, "" for the sum, and what must hold of it.

    Raises ConfigError.
    """
    found = BOUND.fullmatch(words.strip())
    wrong = ConfigError(f"--reward {words} is no bound; write '>=1', 0.5..1, accuracy=0 or 'format<1'")
    if not found or (found["name"] and not found["sign"]):
        raise wrong
    name, sign = found["name"] or "", found["sign"] or "="
    low, dots, high = found["value"].partition("..")
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
    """Rows whose question or completion has these words, in either case, or matches `/this expression/`.

    Raises ConfigError.
    """
    is_pattern = len(text) > 2 and text[0] == text[-1] == "/"
    match, wanted = (pc.match_substring_regex, text[1:-1]) if is_pattern else (pc.match_substring, text)
    try:
        match(pa.array([""]), pattern=wanted)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"--text {text} is no regular expression: {error}") from None
    question, completion = (
        match(pc.field(name), pattern=wanted, ignore_case=not is_pattern) for name in TEXTS
    )
    return question | completion


# --- what is odd: the advantage says whether a completion did better or worse than its group


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    return (
        table[name] if name in table.column_names else pa.chunked_array([pa.nulls(len(table), pa.float64())])
    )


def _rewarded(table: pa.Table) -> pa.ChunkedArray:
    return pc.greater(table["advantage"], 0.0)


def odd_masks(much_repetition: float) -> dict[str, Mask]:
    """Why a row is odd, and how it is told; `much_repetition` is a share of repeated 4-grams."""

    def rewarded_though(mask: Mask) -> Mask:
        return lambda table: pc.and_(_rewarded(table), mask(table))

    return {
        "not judged": lambda table: pc.is_valid(table["failed"]),
        "rewarded though cut off": rewarded_though(lambda table: table["truncated"]),
        "rewarded though badly formed": rewarded_though(
            lambda table: pc.less(_column(table, SCORE + "format"), 0.5)
        ),
        "rewarded though in another language": rewarded_though(
            lambda table: pc.less(_column(table, SCORE + "language"), 0.5)
        ),
        "rewarded though it repeats itself": rewarded_though(
            lambda table: pc.greater(table["repetition"], much_repetition)
        ),
        "punished though right": lambda table: pc.and_(
            pc.less(table["advantage"], 0.0), pc.greater_equal(_column(table, SCORE + "accuracy"), 1.0)
        ),
    }


# --- reading


@dataclass
class Found:
    """The rows that may be shown, without their texts, and how many there are of what."""

    best: list[dict] = field(default_factory=list)  # best first; at most as many as asked for
    worst: list[dict] = field(default_factory=list)  # worst first
    odd: dict[str, list[dict]] = field(default_factory=dict)  # by reason, the largest advantage first
    counts: Counter = field(default_factory=Counter)  # "read", "matching", and every reason


BEST = [("reward", "descending"), ("advantage", "descending"), ("step", "descending"), ("row", "ascending")]
WORST = [("reward", "ascending"), ("advantage", "ascending"), ("step", "descending"), ("row", "ascending")]
OUTSTANDING = [("size", "descending"), ("step", "descending"), ("row", "ascending")]


def look(files: dict[int, Path], wanted: Filter, limit: int, much_repetition: float) -> Found:
    """The best, worst and odd rows of some steps' files. Raises DataError, ConfigError."""
    reasons = odd_masks(much_repetition)
    total, names, heap = Found(odd={reason: [] for reason in reasons}), set[str](), list[pa.Table]()

    def take_heap() -> None:
        """Work on a table costs much the same for few rows, so those of many steps are looked at together."""
        _merge(total, narrowed(pa.concat_tables(heap, promote_options="default"), limit, reasons), limit)
        heap.clear()

    with ThreadPoolExecutor(READERS) as threads:
        newest_first = sorted(files, reverse=True)
        for part in threads.map(lambda step: numbers_of(step, files[step], wanted), newest_first):
            total.counts["read"] += part.read
            names |= part.rewards
            heap.append(part.table)
            if sum(map(len, heap)) >= HEAP or len(heap) >= FILES:
                take_heap()
    if heap:
        take_heap()
    for name, _ in wanted.rewards:
        if name and name not in names:
            raise ConfigError(f"--reward {name}: there is no such reward; {nearest(name, names)}")
    return total


class Numbers(NamedTuple):
    """The wanted rows of one step, without their texts."""

    table: pa.Table
    read: int  # rows of the file
    rewards: set[str]  # that the file has a column of


def numbers_of(step: int, path: Path, wanted: Filter) -> Numbers:
    with opened(path) as file:
        names = file.schema_arrow.names
        rewards = {name.removeprefix(SCORE) for name in names if name.startswith(SCORE)}
        columns = [name for name in names if name in NUMBERS or name.startswith(SCORE)]
        table = numbered(typed(file.read(columns=columns, use_threads=False)), step)
        read = len(table)
        for name, holds in wanted.rewards:
            table = table.filter(holds) if not name or name in rewards else table.slice(0, 0)
        if wanted.text is not None and len(table):
            texts = file.read(columns=list(TEXTS), use_threads=False).take(table["row"])
            for name in TEXTS:
                table = table.append_column(name, texts[name])
            table = table.filter(wanted.text).drop_columns(list(TEXTS))
    return Numbers(table, read, rewards)


def numbered(table: pa.Table, step: int) -> pa.Table:
    table = table.append_column("step", pa.array(np.full(len(table), step)))
    return table.append_column("row", pa.array(np.arange(len(table))))


def narrowed(table: pa.Table, limit: int, reasons: dict[str, Mask]) -> Found:
    """What of one table may be among the best, worst and odd of all."""
    for reason, mask in reasons.items():
        table = table.append_column(reason, pc.fill_null(mask(table), False))
    judged = table.filter(pc.is_valid(table["reward"]))
    found = Found(rows_by(judged, BEST, limit), rows_by(judged, WORST, limit))
    found.counts["matching"] = len(table)
    for reason in reasons:
        odd = table.filter(table[reason])
        found.counts[reason] = len(odd)
        odd = odd.append_column("size", pc.abs(odd["advantage"]))
        found.odd[reason] = rows_by(odd, OUTSTANDING, limit)
    return found


def rows_by(table: pa.Table, order: list[tuple[str, str]], limit: int) -> list[dict]:
    return table.take(pc.sort_indices(table, sort_keys=order)[:limit]).to_pylist()


def _merge(total: Found, part: Found, limit: int) -> None:
    """Keep the best of both; files come newest first, so that of equal rows the newer stays in front."""

    def key(row: dict) -> tuple[float, float]:
        return row["reward"], row["advantage"] or 0.0

    total.best = sorted(total.best + part.best, key=key, reverse=True)[:limit]
    total.worst = sorted(total.worst + part.worst, key=key)[:limit]
    for reason, rows in part.odd.items():
        kept = total.odd[reason] + rows
        total.odd[reason] = sorted(kept, key=lambda row: -(row["size"] or 0.0))[:limit]
    total.counts += part.counts


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Raises DataError for a file that was cut off or is no parquet."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        why = str(error).splitlines()[0]
        raise DataError(
            f"{path} cannot be read ({why}); a kill may have cut it off: remove it, or leave its step out "
            "with --step"
        ) from None


def typed(table: pa.Table) -> pa.Table:
    """The columns of NUMBERS with their types: older files have none for a column of nulls, or lack one."""
    types = [pa.float64(), pa.float64(), pa.bool_(), pa.float64(), pa.string()]
    for name, kind in zip(NUMBERS, types, strict=True):
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), kind))
        elif table[name].type != kind:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    return table


def whole(files: dict[int, Path], places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], dict]:
    """(step, row) -> all columns of it."""
    asked: dict[int, set[int]] = {}
    for step, row in places:
        asked.setdefault(step, set()).add(row)
    rows = {}
    for step, numbers in asked.items():
        first = 0
        with opened(files[step]) as file:
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                for row in numbers & set(range(first, first + len(batch))):
                    rows[step, row] = batch.slice(row - first, 1).to_pylist()[0]
                first += len(batch)
    return rows
