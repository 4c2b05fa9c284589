"""The files that `data.kind=files` reads, and the hash over them; no torch: jobs and the lineage both ask.

`data` is the config's group as a mapping, as config.json and record.json hold it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1pipe.core.errors import ConfigError
from r1pipe.runs import heartbeat

KINDS = ("reasoning", "general", "preferences", "labels")
CHUNK = 1 << 20  # bytes read at once


def located(data: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Kind -> where its sources lie, in their order; a kind may have fewer places than sources.

    `data.path` is a folder that they lie in, or one file: then it stands for the first source of the first
    kind, and the others of that kind (a published test file, say) are left out. Raises ConfigError.
    """
    path = data["path"]
    main = next((kind for kind in KINDS if data[kind]), None)
    found = {kind: [Path(source["path"]) for source in data[kind]] for kind in KINDS}
    if path and Path(path).is_dir():
        return {kind: [_in_folder(name, Path(path), kind) for name in found[kind]] for kind in KINDS}
    return found | ({main: [Path(path)]} if path and main else {})


def _in_folder(name: Path, folder: Path, kind: str) -> Path:
    """A source's file. Raises ConfigError where it does not lie in `data.path`; what it links to may."""
    if name.is_absolute() or ".." in name.parts:
        raise ConfigError(f"data.{kind}: {name} leads out of data.path={folder}; give a name in it")
    return folder / name


def hashes(data: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """SHA-256 over how the files are read, and their bytes; and path -> SHA-256 of each.

    One that is missing adds nothing: it is told when it is read, and this stage may not need it.
    """
    whole = hashlib.sha256(json.dumps({**data, "path": None}, sort_keys=True).encode())
    files = {}
    for path in (path for places in located(data).values() for path in places if path.is_file()):
        own = hashlib.sha256()
        with heartbeat.to_read(path) as file:
            while chunk := file.read(CHUNK):
                whole.update(chunk)
                own.update(chunk)
        files[str(path)] = own.hexdigest()
    return whole.hexdigest(), files
