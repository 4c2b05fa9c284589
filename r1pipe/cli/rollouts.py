"""The best, worst and odd rows of a run's rollouts/step-N.parquet.

Only the files' numeric columns are held in memory; the texts of the few rows that are shown are read last.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from r1pipe.core.errors import ConfigError, nearest
from r1pipe.runs.samples import reading

SCORE = "score_"  # + the name of a reward: its column
NUMBERS = {
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "truncated": pa.bool_(),
    "repetition": pa.float64(),
    "failed": pa.string(),
}
ODD_SCORES = ("accuracy", "format", "language")  # the rewards that `odd_rows` uses
TEXTS = ("question", "completion")
HAS_TEXT = "has_text"
CUT_OFF = "a kill may have cut it off: remove it, or leave its step out with --step"
SAME = 1e-6  # rounding of rewards, which are weighted sums
BOUND = re.compile(r"(?P<name>[a-z]\w*)?\s*(?P<sign><=|>=|<|>|=)?\s*(?P<value>[-+.\de]+)")

Reasons = dict[str, pc.Expression]


@dataclass(frozen=True)
class Query:
    """Which rows to show."""

    rewards: Sequence[tuple[str, pc.Expression]]  # a reward's name ("" for the sum) and its bound
    text: pc.Expression | None
    steps: range | None
    limit: int  # rows of each kind

    @classmethod
    def of(cls, rewards: Iterable[str], text: str | None, step: str | None, limit: int) -> "Query":
        """From the words of the command line. Raises ConfigError."""
        bounds = [bound(words) for words in rewards]
        condition = None if text is None else searched(text)
        return cls(bounds, condition, None if step is None else steps_of(step), limit)


def bound(words: str) -> tuple[str, pc.Expression]:
    """`>=1`, `accuracy=0`, `0.5..1`: a reward's name ("" for the sum), its condition. Raises ConfigError."""
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
    """Rows whose question or completion contains the text, in any case, or matches `/an expression/`."""
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


def steps_of(words: str) -> range:
    """`7`, or `10-20` with both ends. Raises ConfigError."""
    first, dash, last = words.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ConfigError(f"--step {words} is neither a step nor a range of steps; write 7 or 10-20")
    steps = range(int(first), int(last if dash else first) + 1)
    if not steps:
        raise ConfigError(f"--step {words} ends before it begins; write {last}-{first}")
    return steps


def odd_rows(much_repetition: float) -> Reasons:
    """Reason -> the rows that are odd for it; `much_repetition` is a share of repeated 4-grams.

    A positive advantage means that a completion did better than its group.
    """
    rewarded = pc.field("advantage") > 0.0
    return {
        "not judged": pc.field("failed").is_valid(),
        "rewarded though cut off": rewarded & pc.field("truncated"),
        "rewarded though badly formed": rewarded & (pc.field(f"{SCORE}format") < 0.5),
        "rewarded though in another language": rewarded & (pc.field(f"{SCORE}language") < 0.5),
        "rewarded though it repeats itself": rewarded & (pc.field("repetition") > much_repetition),
        "punished though right": (pc.field("advantage") < 0.0) & (pc.field(f"{SCORE}accuracy") >= 1.0),
    }


# --- reading

BEST = [("reward", "descending"), ("advantage", "descending"), ("step", "descending"), ("row", "ascending")]
WORST = [("reward", "ascending"), ("advantage", "ascending"), ("step", "descending"), ("row", "ascending")]
LARGEST = [("size", "descending"), ("step", "descending"), ("row", "ascending")]
KINDS = ("best", "worst", "odd")


@dataclass(frozen=True)
class Found:
    """The rows to show, each once, without their texts."""

    rows: list[tuple[str, dict, list[str]]]  # kind, numbers, the reasons why it is odd
    counts: dict[str, int]  # "read", "matching", and every reason


def look(files: dict[int, Path], query: Query, much_repetition: float) -> Found:
    """The best, worst and odd rows of some steps' files. Raises CheckpointError, ConfigError."""
    columns: set[str] = set()
    for path in files.values():
        with reading(path, CUT_OFF):
            columns |= {*pq.read_schema(path).names}
    rewards = {name.removeprefix(SCORE) for name in columns if name.startswith(SCORE)}
    for name, _ in query.rewards:
        if name and name not in rewards:
            raise ConfigError(f"--reward {name}: there is no such reward; {nearest(name, rewards)}")
    schema, reasons = schema_of(rewards), odd_rows(much_repetition)
    tables = []
    for step, path in files.items():
        with reading(path, CUT_OFF):
            tables.append(numbers(ds.dataset(path, schema), step, query.text, reasons))
    return narrowed(pa.concat_tables(tables), query, reasons)


def schema_of(rewards: Iterable[str]) -> pa.Schema:
    """One schema for all files: older ones lack a column, or have no type for one that is all null."""
    scores = {SCORE + name: pa.float64() for name in sorted({*rewards, *ODD_SCORES})}
    return pa.schema({**NUMBERS, **scores, **dict.fromkeys(TEXTS, pa.string())})


def numbers(dataset: ds.Dataset, step: int, text: pc.Expression | None, reasons: Reasons) -> pa.Table:
    """A step's rows without their texts; with their place, the reasons that hold, and whether `text` does."""
    columns = {name: ds.field(name) for name in dataset.schema.names if name not in TEXTS}
    has_text = pc.scalar(True) if text is None else text
    table = dataset.to_table({**columns, **reasons, HAS_TEXT: has_text, "step": pc.scalar(step)})
    return table.append_column("row", pa.array(range(len(table)), pa.int64()))


def narrowed(table: pa.Table, query: Query, reasons: Collection[str]) -> Found:
    """Some of the rows that `numbers` read: the best, the worst, and the odd ones, largest advantages first.

    Of few rows half are the best, half the worst. The odd ones take turns by reason, so that a frequent one
    does not hide the others.
    """
    counts = {"read": len(table)}
    for _, holds in [*query.rewards, (HAS_TEXT, ds.field(HAS_TEXT))]:
        table = table.filter(holds)
    counts["matching"] = len(table)
    scored = table.filter(pc.is_valid(table["reward"]))
    best, worst = (rows_by(scored, order, query.limit) for order in (BEST, WORST))
    few = len({place(row) for row in [*best, *worst]})
    odd = []
    for reason in reasons:
        rows = table.filter(table[reason])
        counts[reason] = len(rows)
        odd.append(rows_by(rows.append_column("size", pc.abs(rows["advantage"])), LARGEST, query.limit))
    turns = [row for rows in zip_longest(*odd) for row in rows if row is not None]
    chosen: dict[tuple[int, int], tuple[str, dict, list[str]]] = {}
    for kind, rows in zip(KINDS, (best[: (few + 1) // 2], worst, turns), strict=True):
        new = {place(row): row for row in rows if place(row) not in chosen}
        for at, row in islice(new.items(), query.limit):
            chosen[at] = kind, row, [reason for reason in reasons if row[reason]]
    return Found([*chosen.values()], counts)


def place(row: dict) -> tuple[int, int]:
    return row["step"], row["row"]


def rows_by(table: pa.Table, order: list[tuple[str, str]], limit: int) -> list[dict]:
    return table.take(pc.sort_indices(table, sort_keys=order)[:limit]).to_pylist()


def whole(files: dict[int, Path], places: Collection[tuple[int, int]]) -> dict[tuple[int, int], dict]:
    """(step, row) -> all columns of the row."""
    found: dict[tuple[int, int], dict] = {}
    for step in {step for step, _ in places}:
        rows = [row for of_step, row in places if of_step == step]
        with reading(files[step], CUT_OFF):
            taken = ds.dataset(files[step]).take(rows).to_pylist()
        found |= {(step, row): values for row, values in zip(rows, taken, strict=True)}
    return found
