"""Drawing and asking in shards: files that appear whole, so that an interruption costs one of them.

What a finished shard holds is not drawn, asked for or paid for again. Shard NUMBER of COUNT has every
COUNT-th item from NUMBER on; the ranks share the shards out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.runs import samples, stopping
from r1pipe.runs.files import replacing
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout.sampler import Progress
from r1pipe.train.run import Run

SHARD_ROUNDS = 8  # completions per slot in one shard: few to lose, yet enough to keep the slots full

T = TypeVar("T")
# Rows of a shard's items, from (items, shard's number, count of shards, progress).
Draw = Callable[[Sequence[T], int, int, Progress], pa.Table]


def in_shards(
    run: Run[Any],
    ranks: Ranks,
    name: str,
    items: Sequence[T],
    per_shard: int,
    draw: Draw[T],
    idle: Callable[[], object],
    unit: str = "completions",
    each: int = 1,
    state: str = "",
) -> list[Path]:
    """All shard files of the work `name`, in order; the ranks share what is missing, and all call.

    An item makes `each` rows. `state`: what the items depend on; shards of another lie beside. A rank with
    fewer shards than another calls `idle`, since models whose weights lie in shares need all ranks equally
    often. Raises Interrupted in all ranks after a request to stop.
    """
    shards = shard_files(run, ranks, name, len(items), per_shard, state)
    count, total = len(shards), len(items) * each

    def make(number: int) -> pa.Table:
        before = total * (number - ranks.rank) // count

        def progress(done: int, _: int) -> None:
            run.progress(name, before + done * ranks.world_size, total, unit)

        return draw(items[number::count], number, count, progress)

    missing = missing_of(ranks, shards)
    extra = ranks.agree_max(len(missing)) - len(missing)
    with stopping.leaving_early(ranks):
        fill(run, missing, make)
        for _ in range(extra):
            idle()
    return shards


def shard_files(run: Run[Any], ranks: Ranks, name: str, items: int, per_shard: int, state: str) -> list[Path]:
    """The files of in_shards, which need not be there; all ranks call."""
    folder = run.folder.data / "shards" / (f"{name}-{state}" if state else name)
    return planned(ranks, folder, "", items, per_shard)


def planned(ranks: Ranks, folder: Path, prefix: str, items: int, per_shard: int) -> list[Path]:
    """All shard files of a piece of work, which are in `folder` and begin with `prefix`. All ranks call."""
    folder.mkdir(parents=True, exist_ok=True)
    # an interrupted run, maybe with other ranks, has fixed what belongs to which shard
    counts = [int(path.stem.rpartition("-of-")[2]) for path in folder.glob(f"{prefix}*-of-*.*")]
    per_rank = -(-items // (per_shard * ranks.world_size))
    # all have looked before one writes
    count = ranks.agree_max(max(counts, default=per_rank * ranks.world_size))
    return [folder / f"{prefix}{number + 1}-of-{count}.parquet" for number in range(count)]


def missing_of(ranks: Ranks, shards: Sequence[Path]) -> dict[int, Path]:
    """This rank's share of the shards that are to be made, by their numbers."""
    mine = range(ranks.rank, len(shards), ranks.world_size)
    return {number: shards[number] for number in mine if not shards[number].exists()}


def fill(run: Run[Any], missing: Mapping[int, Path], make: Callable[[int], pa.Table]) -> None:
    """Write what `make` gives for the number of each missing shard."""
    for number, path in missing.items():
        write_shard(run, path, make(number))


def write_shard(run: Run[Any], path: Path, table: pa.Table) -> None:
    """The file as a whole, if the run is still this job's."""
    run.launch.check()
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def in_order(
    shards: Iterable[Path], each: int = 1, columns: list[str] | None = None
) -> list[list[dict[str, Any]]]:
    """The `each` rows of every item, in the order of the items, for any number of shards and ranks."""
    tables = [read_shard(shard, columns) for shard in shards]
    by_item = [[rows[i : i + each] for i in range(0, len(rows), each)] for rows in tables]
    turns = chain.from_iterable(zip_longest(*by_item))  # shard NUMBER has items[NUMBER::COUNT]
    return [rows for rows in turns if rows is not None]


def read_shard(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a shard. Raises CheckpointError where it is damaged."""
    with samples.reading(path, "remove it, and repeat the command to make it again"):
        return pq.read_table(path, columns=columns).to_pylist()
