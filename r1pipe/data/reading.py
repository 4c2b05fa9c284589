"""Rows of a data file, of a folder of shards, or of a data set on the hub.

A bad row costs one row, not the file: it is returned with its line and the reason, and the caller decides
what to do with it.
"""

import difflib
import os
import re
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow

from r1pipe.core.errors import DataError
from r1pipe.data.formats import READERS, SHOWN, detect, rows_of
from r1pipe.runs import heartbeat
from r1pipe.runs.data_files import COMPRESSIONS, data_suffix, hub_name, shards

LONGEST = 1_000_000  # bytes of a row, where the config gives no limit
HUB_ANSWERS_IN = 5  # seconds
# What the readers raise on a file of another format than its name says.
_UNREADABLE = (ValueError, OSError, EOFError, StopIteration, zlib.error, pyarrow.ArrowException)
_SPLIT = re.compile(r"(?:^|[-_./])(train|dev|val|test)(?:ing|id|idation)?(?=$|[-_./\d])")


@dataclass(frozen=True)
class Row:
    """One row with its position, so that error messages can name it."""

    values: dict[str, Any]
    path: Path
    number: int  # from 1: the line where it begins, or the row where rows are not lines
    unit: str  # line or row
    split: str | None = None  # that its file in a folder is named after

    @property
    def where(self) -> str:
        return f"{self.path} {self.unit} {self.number}"


@dataclass(frozen=True)
class BadRow:
    path: Path
    number: int
    reason: str  # file, line and remedy included
    text: str  # its beginning


@dataclass
class FileRows:
    rows: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    format: str = ""  # as it is shown: "jsonl, gz", "3 files of parquet", "hub"

    def add(self, number: int, text: str, values: dict[str, Any] | str, row: Row) -> None:
        """A row where `row` says, with these values; or a bad one, where `values` is the reason."""
        row = replace(row, number=number)
        if isinstance(values, str):
            self.bad.append(BadRow(row.path, number, f"{row.where} {values}", text[:SHOWN]))
        else:
            self.rows.append(replace(row, values=values))

    def complete(self) -> None:
        """Give every row every column: None where it lacks one."""
        columns = dict.fromkeys(name for row in self.rows for name in row.values)
        self.rows = [replace(row, values={**columns, **row.values}) for row in self.rows]


def read_rows(path: Path, longest: int = LONGEST) -> FileRows:
    """All rows of a file, of a folder of shards (also a `save_to_disk` folder), or of OWNER/NAME on the hub.

    Raises DataError where it cannot be read as a whole or holds no rows.
    """
    if path.is_dir():
        return _read_folder(path, longest)
    return _read_hub(path, longest) if hub_name(path) else read_file(path, longest)


def read_file(path: Path, longest: int = LONGEST) -> FileRows:
    """All rows of a file, each with every column of the file: None where it lacks one. Rows that cannot be
    parsed or are longer than `longest` bytes are in `bad`.

    Raises DataError where the file as a whole cannot be read or holds no rows.
    """
    if not path.is_file():
        raise DataError(_missing(path))
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; download it again")
    found = FileRows()
    try:
        suffix, compression = detect(path)
        if not suffix:
            raise DataError(f"{path} is of an unknown format; give one of {_known()}")
        found.format = f"{suffix}{compression}".replace(".", " ").strip().replace(" ", ", ")
        unit, read = READERS[suffix]
        place = Row({}, path, 0, unit)
        for number, text, values in read(path, compression, longest):
            heartbeat.tick()
            found.add(number, text, values, place)
    except DataError:
        raise
    except _UNREADABLE as error:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path} cannot be read ({detail}); download it again") from None
    if not found.rows and not found.bad:
        raise DataError(f"{path} holds no rows; download it again")
    found.complete()
    return found


def _known() -> str:
    return f"{', '.join(READERS)}, plain, {' or '.join(COMPRESSIONS)}"


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder; set data.path=FILE or FOLDER"
    similar = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    guess = f"did you mean {similar[0]}? Set" if similar else "set"
    return f"{path} does not exist; {guess} data.path=FILE, or the folder that holds it"


def _read_folder(folder: Path, longest: int) -> FileRows:
    """The rows of all shards, in the order of their names, with the splits that those name."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _read_saved(folder, longest)
    files = shards(folder)
    if not files:
        raise DataError(f"{folder} holds no data files ({_known()}); give a file, or a folder with some")
    formats = sorted({data_suffix(file) for file in files})
    if len(formats) > 1:
        raise DataError(f"{folder} holds files of several formats ({', '.join(formats)}); give one of them")
    names = {file.relative_to(folder).parts[0] for file in files if file.parent != folder}
    subsets = sorted(name for name in names if _split_in(name) is None)
    if len(subsets) > 1:
        raise DataError(f"{folder} holds several data sets ({', '.join(subsets)}); give one of these folders")
    found = FileRows(format=f"{len(files)} {'file' if len(files) == 1 else 'files'} of {formats[0][1:]}")
    for file in files:
        shard = read_file(file, longest)
        split = _split_in(str(file.relative_to(folder)))
        found.rows += [replace(row, split=split) for row in shard.rows]
        found.bad += shard.bad
    found.complete()
    return found


def _split_in(name: str) -> str | None:
    """The split that a file's name in a folder holds: train, dev or test."""
    match = _SPLIT.search(name.lower())
    return match and {"val": "dev"}.get(match[1], match[1])


def _read_saved(folder: Path, longest: int) -> FileRows:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets  # takes a second; only these folders need it

    try:
        saved = datasets.load_from_disk(str(folder))
        splits = saved if isinstance(saved, dict) else {"": saved}
        found = FileRows(format="a folder of save_to_disk")
        for split, table in splits.items():
            place = Row({}, folder / split, 0, "row", _split_in(split))
            for number, text, values in rows_of(table.with_format("arrow").iter(1000), longest):
                heartbeat.tick()
                found.add(number, text, values, place)
    except (*_UNREADABLE, KeyError, TypeError, AttributeError) as error:  # metadata of another shape, too
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{folder} cannot be read ({detail}); save it again") from None
    if not found.rows and not found.bad:
        raise DataError(f"{folder} holds no rows; save it again")
    found.complete()
    return found


def _read_hub(path: Path, longest: int) -> FileRows:
    """The data files of OWNER/NAME or of its folder SUBSET, downloaded once into the hub's own cache. No
    script of a data set is ever run. Raises DataError."""
    import huggingface_hub  # takes a second; it comes with datasets

    name, subset = hub_name(path) or ("", None)
    patterns = [f"{subset}/*" if subset else f"*{suffix}*" for suffix in READERS]
    online = _hub_answers()
    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", allow_patterns=patterns, local_files_only=not online
        )
    except (ValueError, OSError) as error:  # no network, no such data set, or one that needs a login
        detail = (
            " ".join(str(error).split()[:40]) if online else "it does not answer, nor is this in its cache"
        )
        raise DataError(f"{path} is no path here, and not to be had from the hub ({detail})") from None
    inside = Path(folder, subset) if subset else Path(folder)
    if not inside.is_dir():
        raise DataError(f"{name} on the hub has no folder {subset}; give another OWNER/NAME:FOLDER")
    return _read_folder(inside, longest)


def _hub_answers() -> bool:
    """Whether the hub can be reached now; the client itself would try for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_ANSWERS_IN):
            return True
    except urllib.error.HTTPError:  # an answer, too
        return True
    except (OSError, ValueError):  # URLError among them
        return False
