"""Runs and imported checkpoints as they lie on disk, with edges between them: no job is run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1pipe.config import ParentRef
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.runs.files import write_json


def checkpoint(folder: Path, stage: str, run_id: str) -> ParentRef:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"model_type": "deepseek_v3"})
    checkpoints.write_manifest(folder)
    return ParentRef(stage, run_id, str(folder), checkpoints.manifest_hash(folder))


def made(
    root: Path,
    run_id: str,
    stage: str,
    weights: ParentRef,
    reads: Sequence[ParentRef] = (),
    config: dict[str, Any] | None = None,
    **more: Any,
) -> ParentRef:
    """The checkpoint of a finished run with its record; `config`: what the run was launched with, `more`:
    further keys of the record."""
    run = RunFolder(root / run_id)
    own = checkpoint(run.checkpoint(1), stage, run_id)
    run.data.mkdir()
    by_stage = {parent.stage: vars(parent) for parent in reads}
    whole = (config or {}) | {"pipeline": "p", "weights_from": vars(weights), "reads_from": by_stage}
    whole["stage"] = whole.get("stage", {}) | {"name": stage}
    write_json(run.config, whole)
    record = {"run_id": run_id, "stage": stage, "pipeline": "p", "created": "2026-01-01T10:00:00", "steps": 1}
    record |= {"checkpoint": "checkpoints/step-1", "checkpoint_hash": own.hash, "data": {"kind": "files"}}
    record |= {"parents": {"weights": vars(weights), "data": [*by_stage.values()]}, "seed": 0}
    write_json(run.record, record | {"config": whole} | more)
    return own
