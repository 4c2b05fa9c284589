"""The files that `data.kind=files` reads, and their hashes.

`data` is the config group as a mapping, as in config.json and record.json.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1pipe.core.errors import ConfigError
from r1pipe.runs import heartbeat

KINDS = ("reasoning", "general", "preferences", "labels")
CHUNK = 1 << 20  # bytes


def located(data: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Kind -> files of its sources, in order.

    `data.path` may be the folder of all sources, whose files may be links to elsewhere. If it is a file, it
    replaces all sources of the first kind that has any. Raises ConfigError.
    """
    files = {kind: [Path(source["path"]) for source in data[kind]] for kind in KINDS}
    if not data["path"]:
        return files
    path = Path(data["path"])
    if not path.is_dir():
        first = next((kind for kind in KINDS if data[kind]), None)
        return files | ({first: [path]} if first else {})
    for kind, names in files.items():
        for name in names:
            if name.is_absolute() or ".." in name.parts:
                raise ConfigError(f"data.{kind}: {name} is outside data.path={path}; give a name in it")
    return {kind: [path / name for name in names] for kind, names in files.items()}


def hashes(data: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """SHA-256 over the config group and all files' bytes; and path -> SHA-256 of each file.

    Missing files are left out: reading them raises an error, and this stage may not need them.
    """
    whole = hashlib.sha256(json.dumps({**data, "path": None}, sort_keys=True).encode())
    files = {}
    for path in (path for paths in located(data).values() for path in paths if path.is_file()):
        own = hashlib.sha256()
        with heartbeat.to_read(path) as file:
            while chunk := file.read(CHUNK):
                whole.update(chunk)
                own.update(chunk)
        files[str(path)] = own.hexdigest()
    return whole.hexdigest(), files
