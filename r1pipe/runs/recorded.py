"""A run's record.json as it was written, or why it cannot be used: its types, its own hash, its edges."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1pipe.config import ParentRef
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.jsonfile import read_object

NEEDED = ("stage", "pipeline", "created", "checkpoint", "checkpoint_hash")
TEXTS = (*NEEDED, "run_id", "config_hash", "data_hash", "tokenizer_hash", "template_hash", "record_hash")
GROUPS = ("metrics", "seconds", "code", "versions", "data", "config", "history", "files")
NUMBERS = {
    *("pass_at_1", "greedy", "cons_at_k", "k", "problems", "samples", "format_rate", "language_consistency"),
    *("length_mean", "truncation_rate", "general_score", "preference_score", "refusal_rate"),
    *("safe_answer_rate", "pairs", "labels", "accuracy", "auc"),
}
OF_NUMBERS = ("general_by_kind", "strategies")
OF_GROUPS = ("by_task", "by_language", "reward_models")
OWN_HASH = "record_hash"  # of all the rest of the record


def record_of(run: RunFolder) -> dict[str, Any]:
    """The record of a finished run. Raises CheckpointError where it has none that can be used."""
    if not run.record.exists():
        raise CheckpointError(
            f"run {run.run_id} has not finished; let it (`r1pipe run` goes on with it) or give a path in "
            f"{run.checkpoints}"
        )
    return read_record(run.record)


def read_record(path: Path) -> dict[str, Any]:
    """A record.json, those of older versions included. Raises CheckpointError naming file, key and remedy."""
    record = read_object(path)
    wrong = next((key for key in NEEDED if key not in record), None) or wrong_type(record)
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong} is missing or of a wrong type; move the run folder away and make the run again"
        )
    return record


def wrong_type(record: Mapping[str, Any]) -> str | None:
    """The first key whose value is not what a record holds there; a key that is missing is not wrong."""
    for key in TEXTS:
        if not isinstance(record.get(key), str | None):
            return key
    for key in GROUPS:
        if not isinstance(record.get(key), dict | None):
            return key
    for key in ("wall_s", "seed", "steps"):
        if not _is_number(record.get(key, 0)):
            return key
    if not all(map(_is_number, (record.get("seconds") or {}).values())):
        return "seconds"
    return _wrong_text(record) or _wrong_edge(record) or _wrong_metric(record.get("metrics") or {})


def _wrong_text(record: Mapping[str, Any]) -> str | None:
    """The first text within a group that is none."""
    for group, key in (("code", "revision"), ("data", "hash")):
        if not isinstance((record.get(group) or {}).get(key), str | None):
            return f"{group}.{key}"
    return None if all(isinstance(sha, str) for sha in (record.get("files") or {}).values()) else "files"


def _wrong_edge(record: Mapping[str, Any]) -> str | None:
    parents = record.get("parents")
    if parents is None:
        return None
    if not isinstance(parents, dict) or not isinstance(parents.get("data", []), list):
        return "parents"
    edges = [one for one in [parents.get("weights"), *parents.get("data", [])] if one is not None]
    fields = ParentRef.__dataclass_fields__
    sound = all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in fields) for one in edges
    )
    return None if sound else "parents"


def _wrong_metric(metrics: Mapping[str, Any]) -> str | None:
    """The first metric that is no number, interval or group, where its name means one."""
    return next((f"metrics.{name}" for name, value in metrics.items() if not _is_metric(name, value)), None)


def _is_metric(name: str, value: Any) -> bool:
    """Whether what is shown under a known name can be; others may be anything."""
    if value is None:
        return True
    if name == "pass_at_1_ci":
        return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    if name in OF_NUMBERS:
        return isinstance(value, dict) and all(one is None or _is_number(one) for one in value.values())
    if name in OF_GROUPS:
        return isinstance(value, dict) and all(
            isinstance(group, dict) and all(_is_metric(key, one) for key, one in group.items())
            for group in value.values()
        )
    return _is_number(value) if name in NUMBERS else True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def edges(record: Mapping[str, Any]) -> list[tuple[str, ParentRef, str | None]]:
    """(kind, parent, hash of the parent's own record where this one names it), weights first."""
    parents = record.get("parents") or {}
    named = [("weights", parents.get("weights")), *(("data", one) for one in parents.get("data") or [])]
    return [
        (kind, ParentRef(*(one[key] for key in ParentRef.__dataclass_fields__)), one.get(OWN_HASH))
        for kind, one in named
        if one
    ]


def own_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 over the record but for this hash itself. It finds damage and edits; a forger can make it anew,
    but not in the records of the stages that came after, which name it."""
    rest = {key: value for key, value in record.items() if key != OWN_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def record_beside(checkpoint: Path, record_hash: str | None = None) -> Path:
    """Where the record of a checkpoint's run is: in its run folder, or (data/base) beside the weights.

    A run that was extended has several: the one with this `record_hash`, or else of when the run had finished
    at this checkpoint. Raises CheckpointError where one cannot be read.
    """
    run = RunFolder(checkpoint.parent.parent)
    if checkpoint.parent.name != run.checkpoints.name:
        return checkpoint / run.record.name
    for path in sorted(run.path.glob("record-step-*.json")):
        known = read_object(path).get(OWN_HASH)
        if known == record_hash if record_hash else path.stem == f"record-{checkpoint.name}":
            return path
    return run.record
