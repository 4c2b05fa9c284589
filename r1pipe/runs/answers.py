"""The answers that an unfinished run keeps, so that none is drawn or paid for twice."""

import json
from contextlib import suppress
from pathlib import Path

from r1pipe.core.paths import RunFolder

JOURNAL = ".jsonl"  # of a shard that is not whole yet: {"item": int, "rows": [...], "spent": {...}}
OF_JUDGES = "judge-*.jsonl"  # {"key": str, "texts": [...]} and {"spent": {...}}


def kept_answers(run: RunFolder) -> int:
    """How many: of a teacher, of judges, and completions of this run's own model."""
    journals = (run.data / "shards").glob(f"*/*{JOURNAL}")
    kept = sum(len(row.get("rows", [])) for path in journals for row in _lines(path))
    kept += sum(len(row.get("texts", [])) for path in run.data.rglob(OF_JUDGES) for row in _lines(path))
    shards = [*(run.data / "shards").glob("*/*.parquet"), *run.drawn.glob("*.parquet")]
    return kept + sum(map(_rows, shards))


def _lines(path: Path) -> list[dict]:
    """The whole lines; a kill may have cut off the last one."""
    found = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _rows(path: Path) -> int:
    import pyarrow as pa  # slow to import, and seldom needed here
    import pyarrow.parquet as pq

    with suppress(OSError, pa.ArrowException):
        return int(pq.read_metadata(path).num_rows)
    return 0
