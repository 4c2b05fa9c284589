"""Changes between a run's sessions: config values, code, versions.

Each is a line of config_history.jsonl: {"time": "2026-11-25T03:56:34+00:00", "changed": {"stage.keep":
[2, 5]}} or {"code.revision": ["7adeff0…", "9c8dfaa…"], "versions.torch": ["2.12.0", "2.13.0"]}.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from shutil import copyfile
from typing import Any

from r1pipe.config.changes import Change, changes
from r1pipe.core.paths import RunFolder
from r1pipe.runs.files import append_line, read_json


def note(run: RunFolder, changed: Sequence[Change]) -> None:
    """Append the changes, if there are any."""
    if changed:
        values = {change.key: [change.old, change.new] for change in changed}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(run.config_history, {"time": now, "changed": values})


def note_code(run: RunFolder, env: Mapping[str, Any], diff: str) -> list[Change]:
    """Append and return the changes of code and versions since the run's last session, whose diff is kept.

    To be called before env.json and code.diff are overwritten.
    """
    before = read_json(run.env)
    if not before or not run.launcher_log.exists():  # nothing has run yet
        return []
    old_diff = run.diff.read_bytes() if run.diff.exists() else b""
    old, new = of_code(before, old_diff), of_code(env, diff.encode())
    changed = changes(old, new)
    if old["code"] != new["code"] and old_diff:
        copyfile(run.diff, run.earlier_diff(old["code"]["diff_hash"]))
    note(run, changed)
    return changed


def set_record_aside(run: RunFolder) -> None:
    """Make a finished run unfinished, to be extended; it keeps its earlier record."""
    if run.record.exists():
        run.record.rename(run.earlier_record(steps_of(run)))


def steps_of(run: RunFolder) -> int:
    """Optimizer steps of a finished run; 0 if its record has none."""
    steps = read_json(run.record).get("steps")
    return steps if isinstance(steps, int) else 0


def of_code(env: Mapping[str, Any], diff: bytes) -> dict[str, Any]:
    """What env.json and the diff say of the code that a session runs."""
    revision = (env.get("code") or {}).get("revision")
    code = {"revision": revision, "diff_hash": hashlib.sha256(diff).hexdigest()}
    return {"code": code, "python": env.get("python"), "versions": env.get("versions")}
