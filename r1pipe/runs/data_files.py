"""The files that `data.kind=files` reads, and their hashes.

`data` is the config group as a mapping, as in config.json and record.json.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1pipe.core.errors import ConfigError, DataError
from r1pipe.runs import heartbeat

KINDS = ("reasoning", "general", "preferences", "labels")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
WHOLE_FOLDER = "."  # the path of a source that is all of `data.path`
# Hashed only where they have another value than this: older hashes stay valid.
NEW_KEYS: dict[str, Any] = {"layout": None, "answer_form": None, "prompts": True}
NOT_READ = ("licence",)  # keys of the group and of its sources that change nothing that is read
CHUNK = 1 << 20  # bytes
# What lies beside the shards: of save_to_disk and of the hub's older folders.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HUB_NAME = re.compile(r"(?P<owner>[\w-][\w.-]*)/(?P<name>[\w-][\w.-]*)(?::(?P<subset>[\w.-]+))?")


def located(data: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Kind -> paths of its sources, in order: files, folders of shards, or names on the hub.

    `data.path` may be the folder of all sources, whose files may be links to elsewhere. If it is a file or a
    name on the hub, it replaces all sources of the first kind that has any. Raises ConfigError.
    """
    files = {kind: [Path(source["path"]) for source in data[kind]] for kind in KINDS}
    if not data["path"]:
        if any(Path(WHOLE_FOLDER) in paths for paths in files.values()):
            raise ConfigError(f"data={data['name']} names no file; set data.path=FILE")
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


def check_there(data: Mapping[str, Any]) -> None:
    """Raises DataError where none of the files is here, and none of the sources is a name on the hub."""
    paths = [path for paths in located(data).values() for path in paths]
    if not paths or any(path.exists() or hub_name(path) for path in paths):
        return
    given, names = data["path"], ", ".join(sorted({path.name for path in paths}))
    if not given:
        raise DataError(f"data={data['name']} needs {names}; set data.path=FILE, or the folder that holds it")
    if not Path(given).exists():
        raise DataError(f"data.path={given} does not exist; give a file, or the folder that holds it")
    raise DataError(f"data.path={given} holds none of the files of data={data['name']}: {names}")


def data_suffix(path: Path) -> str:
    """The suffix that names a file's format, without its compression; "" where it names none."""
    path = Path(path.name.lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in SUFFIXES else ""


def hub_name(path: Path) -> tuple[str, str | None] | None:
    """OWNER/NAME, with :FOLDER or without, which is no path here: the data set's name and its subset."""
    match = _HUB_NAME.fullmatch(str(path))
    if not match or path.exists() or path.parent.is_dir() or data_suffix(path):
        return None
    return f"{match['owner']}/{match['name']}", match["subset"]


def shards(folder: Path) -> list[Path]:
    """The data files in a folder and its subfolders, in order; hidden files and metadata are left out."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    inside += [path for below in inside if below.is_dir() for path in below.iterdir()]
    found = [path for path in inside if data_suffix(path) and path.is_file() and path.name[0] != "."]
    return sorted(p for p in found if p.name not in _METADATA and not p.name.startswith("cache-"))


def hashes(data: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """SHA-256 over the config group and all files' bytes; and path -> SHA-256 of each file.

    Missing files are left out: reading them raises an error, and this stage may not need them. Of a data set
    on the hub, its name and its revision in the cache are hashed.
    """
    group = {kind: [_without_unset(source) for source in data[kind]] for kind in KINDS}
    read = {key: value for key, value in data.items() if key not in NOT_READ}
    whole = hashlib.sha256(json.dumps({**read, **group, "path": None}, sort_keys=True).encode())
    files = {}
    for path in (path for paths in located(data).values() for path in paths):
        named = hub_name(path)
        if named:
            whole.update(str(path).encode())
        is_folder = path.is_dir()
        for file in shards(path) if is_folder else [_revision(named[0]) if named else path]:
            if not file.is_file():
                continue
            if is_folder:
                whole.update(str(file.relative_to(path)).encode())  # it may name a split
            own = hashlib.sha256()
            with heartbeat.to_read(file) as content:
                while chunk := content.read(CHUNK):
                    whole.update(chunk)
                    own.update(chunk)
            files[str(path) if named else str(file)] = own.hexdigest()
    return whole.hexdigest(), files


def _without_unset(source: Mapping[str, Any]) -> dict[str, Any]:
    read = {key: value for key, value in source.items() if key not in NOT_READ}
    return {key: value for key, value in read.items() if key not in NEW_KEYS or value != NEW_KEYS[key]}


def _revision(name: str) -> Path:
    """Where the hub's cache keeps the commit of a data set that has been downloaded."""
    from huggingface_hub import constants  # only names on the hub need it

    return Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / "main"
