"""Drawing and asking in shards: files that appear whole, so that an interruption costs one of them.

What a finished shard holds is not drawn, asked for or paid for again. Shard NUMBER of COUNT has every
COUNT-th item from NUMBER on; the ranks share the shards out.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.runs import stopping
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
    fewer shards than another calls `idle`, since models whose weights are sharded need all ranks equally
    often. Raises Interrupted in all ranks after a request to stop.
    """
    folder = run.folder.data / "shards" / (f"{name}-{state}" if state else name)
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    # an interrupted run, maybe with other ranks, has fixed what belongs to which shard
    counts = [int(path.stem.rpartition("-of-")[2]) for path in folder.glob("*-of-*.parquet")]
    ranks.barrier()  # all have looked before one writes
    per_rank = -(-len(items) // (per_shard * ranks.world_size))
    count = max(counts, default=per_rank * ranks.world_size)
    shards = [folder / f"{number + 1}-of-{count}.parquet" for number in range(count)]
    total = len(items) * each
    missing = [n for n in range(ranks.rank, count, ranks.world_size) if not shards[n].exists()]
    extra = ranks.agree_max(len(missing)) - len(missing)
    with stopping.leaving_early(ranks):
        for number in missing:
            before = total * (number - ranks.rank) // count

            def progress(done: int, _: int, before: int = before) -> None:
                run.progress(name, before + done * ranks.world_size, total, unit)

            table = draw(items[number::count], number, count, progress)
            run.launch.check()
            with replacing(shards[number]) as temporary:
                pq.write_table(table, temporary, compression="zstd")
        for _ in range(extra):
            idle()
    return shards


def in_order(shards: Iterable[Path], each: int = 1) -> list[list[dict[str, Any]]]:
    """The `each` rows of every item, in the order of the items, for any number of shards and ranks."""
    tables = [pq.read_table(shard).to_pylist() for shard in shards]
    by_item = [[rows[i : i + each] for i in range(0, len(rows), each)] for rows in tables]
    turns = chain.from_iterable(zip_longest(*by_item))  # shard NUMBER has items[NUMBER::COUNT]
    return [rows for rows in turns if rows is not None]
