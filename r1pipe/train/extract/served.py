"""A server's answers, kept as they come: requests go on from shard to shard, and no answer is paid for twice.

A shard (train/shards.py) is written when all of its answers are there. Until then they are lines of a
file beside it: {"item": 12, "rows": [{"text": "…", …}], "spent": {"requests": 1, …}}
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from r1pipe.chat.answerer import Spent
from r1pipe.runs import stopping
from r1pipe.runs.answers import JOURNAL
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.run import Run
from r1pipe.train.shards import missing_of, shard_files, write_shard

BYTES = "latin-1"  # key of bytes in JSON: each is a character

T = TypeVar("T")
Rows = list[dict[str, Any]]
# Of (item's number, item) in turn: (item's number, its rows, what they took), as they come.
Ask = Callable[[Iterable[tuple[int, T]]], Iterator[tuple[int, Rows, Spent]]]


class Journal:
    """The answers of a shard that is not whole yet."""

    def __init__(self, shard: Path):
        """Reads what an earlier session has left; a line that a kill has cut off goes, and a damaged one is
        left out: its item is asked again."""
        self.path = shard.with_suffix(JOURNAL)
        self.rows: dict[int, Rows] = {}  # by the item's number
        self.spent = Spent()
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self.path.write_bytes(whole)
        for line in whole.splitlines():
            with suppress(ValueError):
                row = json.loads(line, object_hook=_with_bytes)
                self._take(row["item"], row["rows"], Spent(**row["spent"]))

    def add(self, item: int, rows: Rows, spent: Spent) -> None:
        line = json.dumps({"item": item, "rows": rows, "spent": asdict(spent)}, default=_without_bytes)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        self._take(item, rows, spent)

    def _take(self, item: int, rows: Rows, spent: Spent) -> None:
        self.rows[item] = rows
        self.spent += spent


def asked_in_shards(
    run: Run[Any],
    ranks: Ranks,
    name: str,
    items: Sequence[T],
    per_shard: int,
    ask: Ask[T],
    table: Callable[[Rows, Spent], pa.Table],
    each: int,
    state: str,
) -> list[Path]:
    """As train.shards.in_shards, for a server, which is asked across the bounds of shards. `table`: of a
    shard's rows and what they took."""
    shards = shard_files(run, ranks, name, len(items), per_shard, state)
    count, missing = len(shards), missing_of(ranks, shards)
    whole = {*range(ranks.rank, count, ranks.world_size)} - missing.keys()
    for number in whole:  # a kill may have come before its journal was removed
        shards[number].with_suffix(JOURNAL).unlink(missing_ok=True)
    done = sum(len(range(number, len(items), count)) for number in whole)
    journals: dict[int, Journal] = {}

    def write_if_whole(number: int) -> None:
        journal, wanted = journals[number], range(number, len(items), count)
        if len(journal.rows) < len(wanted):
            return
        rows = [row for item in wanted for row in journal.rows[item]]
        write_shard(run, shards[number], table(rows, journal.spent))
        journal.path.unlink(missing_ok=True)
        del journals[number]

    def without_answer() -> Iterator[tuple[int, T]]:
        nonlocal done
        for number in missing:
            journal = journals[number] = Journal(shards[number])
            done += len(journal.rows)
            left = [item for item in range(number, len(items), count) if item not in journal.rows]
            write_if_whole(number)
            yield from ((item, items[item]) for item in left)

    with stopping.leaving_early(ranks):
        for item, rows, spent in ask(without_answer()):
            journals[item % count].add(item, rows, spent)
            write_if_whole(item % count)
            done += 1
            run.shared_progress(name, done * each, len(items) * each, "answers")
    return shards


def _without_bytes(value: bytes) -> dict[str, str]:
    return {BYTES: value.decode(BYTES)}


def _with_bytes(value: dict[str, Any]) -> Any:
    return value[BYTES].encode(BYTES) if BYTES in value else value
