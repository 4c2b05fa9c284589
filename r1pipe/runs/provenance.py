"""Writing record.json: what made a checkpoint (parents, data, config, code), with hashes."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from r1pipe.config import ParentRef, RunConfig, config_hash, to_mapping
from r1pipe.config.changes import Change, changes
from r1pipe.config.custom_rewards import CustomReward
from r1pipe.core.paths import SET_ASIDE, RunFolder
from r1pipe.core.redaction import publishable
from r1pipe.runs import checkpoints, machine
from r1pipe.runs.checkpoints import file_hash, manifest_hash
from r1pipe.runs.files import Tail, read_json, read_object, write_json
from r1pipe.runs.lineage.fit import template_hash
from r1pipe.runs.record import (
    OWN_HASH,
    CustomRewardSource,
    Edge,
    Record,
    Result,
    note,
    own_hash,
    record_beside,
)

FORMAT = 2  # of record.json: 1 had no config, diff, data group and no hash of itself; early 2s no files


class ChatFormat(Protocol):
    """The hash of a tokenizer."""

    @property
    def tokenizer_hash(self) -> str: ...


def job_record(
    folder: RunFolder,
    config: RunConfig,
    checkpoint: Path,
    chat: ChatFormat,
    result: Result,
    source_hash: str | None = None,
) -> Record:
    """The record of a finished job. `source_hash`: of the data source, where the result's `data_hash` is of
    samples drawn from it."""
    set_aside = folder.data / SET_ASIDE
    paths = [folder.metrics, folder.tripwires, folder.dev_evaluations]
    paths += [folder.samples, folder.completions]
    paths += [*folder.rollouts.glob("*"), *folder.data.glob("*")]
    # the dataset's hash is data_hash
    files = sorted(path for path in paths if path.is_file() and path != folder.dataset)
    # as the launcher noted it; unknown for a script that was started by hand
    code = read_object(folder.env).get("code", {}) if folder.env.exists() else {}
    record: Record = {
        "format": FORMAT,
        "run_id": folder.run_id,
        "stage": config.stage.name,
        "seed": config.seed,
        "pipeline": config.pipeline,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "parents": {
            "weights": _edge(config.weights_from) if config.weights_from else None,
            "data": [_edge(parent) for parent in config.reads_from.values()],
            **({"teacher": _edge(config.teacher_from)} if config.teacher_from else {}),
            **({"judge": _edge(config.judge_from)} if config.judge_from else {}),
        },
        "config_hash": config_hash(config),
        "config": publishable(to_mapping(config)),
        "data": {
            "name": config.data.name,
            "kind": config.data.kind,
            "path": config.data.path,
            "hash": source_hash,
            "set_aside": len(set_aside.read_bytes().splitlines()) if set_aside.exists() else 0,
        },
        "code": {
            "revision": code.get("revision"),
            "dirty": code.get("dirty"),
            "diff": folder.diff.name,
            "diff_hash": file_hash(folder.diff) if folder.diff.exists() else None,
        },
        "files": {path.relative_to(folder.path).as_posix(): file_hash(path) for path in files},
        "tokenizer_hash": chat.tokenizer_hash,
        "template_hash": template_hash(checkpoint),
        "checkpoint": checkpoint.relative_to(folder.path).as_posix(),
        "checkpoint_hash": manifest_hash(checkpoint),
        "versions": machine.versions(),
        **result,
    }
    if folder.rewards.exists():
        record["rewards"] = read_object(folder.rewards)
    if folder.teacher.exists():
        record["teacher"] = read_object(folder.teacher)  # type: ignore[typeddict-item]
    history = folder.config_history
    if history.exists():
        changed = sorted({key for row in Tail(history).read() for key in row["changed"]})
        record["history"] = {"file": history.name, "hash": file_hash(history), "changed": changed}
    record[OWN_HASH] = own_hash(record)
    return record


def note_rewards(run: RunFolder, rewards: Sequence[CustomReward]) -> list[Change]:
    """Write rewards.json; how the custom rewards differ from those of the run's last session, as its history
    says from now on."""
    now: dict[str, CustomRewardSource] = {
        reward.name: {"source": reward.place, "hash": reward.hash or None, "version": reward.version or None}
        for reward in rewards
    }
    before = read_json(run.rewards)  # empty where there is none
    changed = changes({"rewards": before}, {"rewards": now}) if checkpoints.holds_work(run) else []
    note(run, changed)
    write_json(run.rewards, now)
    return changed


def _edge(parent: ParentRef) -> Edge:
    """A parent with the hash of its own record: later edits of that record show."""
    path = record_beside(Path(parent.checkpoint))
    record = read_object(path) if path.exists() else {}
    return {
        "stage": parent.stage,
        "run_id": parent.run_id,
        "checkpoint": parent.checkpoint,
        "hash": parent.hash,
        "record_hash": record.get(OWN_HASH),
    }
