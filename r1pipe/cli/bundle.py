"""Put the newest pre-training run's checkpoint into data/base/, with its record and its curve.

python -m r1pipe.cli.bundle ROOT PIPELINE        (`make pretrain` calls it)
"""

import json
import shutil
import sys
from pathlib import Path

from r1pipe.core.errors import CheckpointError, R1pipeError
from r1pipe.core.paths import RunFolder, content_dir, inside
from r1pipe.runs import checkpoints, lineage
from r1pipe.runs.record import record_of

CURVE_POINTS = 600  # enough to draw; every evaluation is kept besides


def bundle(run: RunFolder, base: Path) -> None:
    """Copy what is published of a finished run's checkpoint; the state for resume stays behind."""
    record = record_of(run)
    source = inside(run.path, record["checkpoint"], run.record)
    checkpoints.verify(source, record["checkpoint_hash"])
    fresh = checkpoints.begin(base)
    checkpoints.copy_published(source, fresh)
    checkpoints.finish(base)
    # beside the manifest, not in it: the bundled checkpoint keeps the hash that its run gave it
    shutil.copyfile(run.record, base / run.record.name)
    if run.screening.exists():
        shutil.copyfile(run.screening, base / run.screening.name)
    rows = run.metrics.read_text(encoding="utf-8").splitlines()
    every = max(1, len(rows) // CURVE_POINTS)
    curve = [
        row
        for i, row in enumerate(rows)
        if i % every == 0 or any(key.startswith("eval/") for key in json.loads(row))
    ]
    (base / "curve.jsonl").write_text("\n".join(curve) + "\n", encoding="utf-8")


def main(root: str, pipeline: str) -> None:
    run = lineage.newest_run("pretrain", lineage.SearchPath(Path(root), pipeline, None))
    if run is None:
        raise CheckpointError(
            f"no finished pretrain run of pipeline {pipeline} under {root}; run `make pretrain`"
        )
    bundle(run, content_dir() / "base")
    print(f"data/base is now the checkpoint of {run.run_id}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except R1pipeError as error:
        sys.exit(str(error))
