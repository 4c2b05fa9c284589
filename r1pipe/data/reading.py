"""Rows of a data file through `datasets`: json, jsonl, csv, parquet; errors name the line."""

import csv
import difflib
import gzip
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow

from r1pipe.errors import DataError

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# What the readers behind `datasets` raise on a file that is not what its name says.
_UNREADABLE = (ValueError, OSError, EOFError, StopIteration, pyarrow.ArrowException)


@dataclass(frozen=True)
class Row:
    """One row with its place, so that whatever is wrong with it can be told by file and line."""

    values: dict[str, Any]
    path: Path
    number: int  # from 1, empty lines not counted

    @property
    def where(self) -> str:
        """`file.jsonl line 12`; `row 12` in formats whose rows are not lines."""
        if not _is_lines(self.path):
            return f"{self.path} row {self.number}"
        filled = (line for line, text in _lines(self.path) if text.strip())
        return f"{self.path} line {next(line for i, line in enumerate(filled, 1) if i == self.number)}"


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Raises DataError naming file, line and remedy.

    Streamed, so that `datasets` keeps no cache: nothing lands in the user's home, and a file that
    changed is never answered from an old copy.
    """
    if not path.is_file():
        raise DataError(_missing(path))
    kind = FORMATS.get(_suffix(path))
    if kind is None:
        raise DataError(f"{path} is of an unknown format; give one of {', '.join(FORMATS)}, plain or .gz")
    import datasets  # takes a second; only file data needs it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would print on a bad file is told better below
    options = _csv_options(path) if kind == "csv" else {}
    try:
        with tempfile.TemporaryDirectory() as locks:  # it still wants a place for its lock files
            stream = datasets.load_dataset(
                kind, data_files=str(path), split="train", streaming=True, cache_dir=locks, **options
            )
            rows = [Row(values, path, i) for i, values in enumerate(stream, 1)]
    except _UNREADABLE as error:
        raise DataError(_what_is_wrong(path, error)) from None
    if not rows:
        raise DataError(f"{path} holds no rows; download it again")
    return rows


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; give a file in it"
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder; set data.path=FILE or FOLDER"
    similar = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    guess = f"did you mean {similar[0]}? " if similar else ""
    return f"{path} does not exist; {guess}Set data.path=FILE, or the folder that holds it"


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        yield from enumerate(file, 1)


def _is_lines(path: Path) -> bool:
    """Whether each row is one line: .jsonl, and .json files that are jsonl in truth."""
    if FORMATS[_suffix(path)] != "json":
        return False
    with _open(path) as file:
        return not file.read(4096).lstrip().startswith(b"[")


def _csv_options(path: Path) -> dict[str, Any]:
    """Every column as text: a guessed type would turn 007 into 7, and an empty field into NaN."""
    from datasets import Features, Value

    try:
        with _open(path) as file:
            header = next(csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig")), [])
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(_what_is_wrong(path, error)) from None
    return {"features": Features({name: Value("string") for name in header}), "keep_default_na": False}


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Line and remedy for a file that a reader refused; the readers themselves rarely say the line."""
    if path.stat().st_size == 0:
        return f"{path} is empty; download it again"
    if FORMATS[_suffix(path)] == "json" and not isinstance(error, gzip.BadGzipFile | EOFError):
        found = _bad_line(path) if _is_lines(path) else _bad_array(path)
        if found:
            return found
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    line = re.search(r"in line (\d+)", detail)
    return f"{path}{f' line {line[1]}' if line else ''} cannot be read ({detail}); download it again"


def _bad_line(path: Path) -> str | None:
    for number, line in _lines(path):
        try:
            value = json.loads(line) if line.strip() else {}
        except UnicodeDecodeError:
            return f"{path} line {number} is not UTF-8; save the file as UTF-8"
        except json.JSONDecodeError as error:
            return f"{path} line {number} is not JSON ({error.msg}, column {error.colno}); correct it"
        if not isinstance(value, dict):
            return f'{path} line {number} is no JSON object; each line must be like {{"question": "..."}}'
    return None


def _bad_array(path: Path) -> str | None:
    try:
        with _open(path) as file:
            value = json.loads(file.read())
    except UnicodeDecodeError:
        return f"{path} is not UTF-8; save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"{path} line {error.lineno} is not JSON ({error.msg}, column {error.colno}); correct the file"
    odd = next((i for i, row in enumerate(value, 1) if not isinstance(row, dict)), None)
    return None if odd is None else f"{path} row {odd} is no JSON object; remove it"
