"""Rows of a data file: json, jsonl, csv or parquet, plain or gzipped.

A bad row costs one row, not the file: it is returned with its line and the reason, and the caller decides
what to do with it.
"""

import csv
import difflib
import gzip
import io
import json
import logging
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow

from r1pipe.core.errors import DataError
from r1pipe.runs import heartbeat

LONGEST = 1_000_000  # bytes of a row, where the config gives no limit
SHOWN = 500  # characters of a bad row that are kept
# What the readers raise on a file of another format than its name says.
_UNREADABLE = (ValueError, OSError, EOFError, StopIteration, zlib.error, pyarrow.ArrowException)
_NOT_UTF8 = "is not UTF-8; save the file as UTF-8"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row with its position, so that error messages can name it."""

    values: dict[str, Any]
    path: Path
    number: int  # from 1: the line where it begins, or the row where rows are not lines
    unit: str  # line or row

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


# Number, the row as text, and its values; or, in place of the values, why it cannot be used.
RawRows = Iterator[tuple[int, str, dict[str, Any] | str]]


def read_file(path: Path, longest: int = LONGEST) -> FileRows:
    """All rows of a file, each with every column of the file: None where it lacks one. Rows that cannot be
    parsed or are longer than `longest` bytes are in `bad`.

    Raises DataError where the file as a whole cannot be read or holds no rows.
    """
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file():
        raise DataError(_missing(path))
    if suffix not in READERS:
        raise DataError(f"{path} is of an unknown format; give one of {', '.join(READERS)}, plain or .gz")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; download it again")
    found, columns = FileRows(), dict[str, None]()
    try:
        if suffix == ".json" and not _is_array(path):
            suffix = ".jsonl"
        unit, read = READERS[suffix]
        for number, text, values in read(path, longest):
            heartbeat.tick()
            if isinstance(values, str):
                found.bad.append(BadRow(path, number, f"{path} {unit} {number} {values}", text[:SHOWN]))
            else:
                columns |= dict.fromkeys(values)
                found.rows.append(Row(values, path, number, unit))
    except DataError:
        raise
    except _UNREADABLE as error:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path} cannot be read ({detail}); download it again") from None
    if not found.rows and not found.bad:
        raise DataError(f"{path} holds no rows; download it again")
    found.rows = [replace(row, values={**columns, **row.values}) for row in found.rows]
    return found


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; give a file in it"
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder; set data.path=FILE or FOLDER"
    similar = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    guess = f"did you mean {similar[0]}? Set" if similar else "set"
    return f"{path} does not exist; {guess} data.path=FILE, or the folder that holds it"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _is_array(path: Path) -> bool:
    with _open(path) as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _json_lines(path: Path, longest: int) -> RawRows:
    with _open(path) as file:
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest and not line.endswith(b"\n"):
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass
                yield number, line[:SHOWN].decode(errors="replace"), _too_long(longest)
            elif line.strip():
                yield number, line[: 4 * SHOWN].decode(errors="replace"), _parse_json(line)


def _too_long(longest: int) -> str:
    return f"is longer than data.longest_row={longest} bytes; shorten it, or raise the limit"


def _parse_json(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        return _NOT_UTF8
    except json.JSONDecodeError as error:
        return f"is not JSON ({error.msg}, column {error.colno}); correct it"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, NaN; [[[[...
        return f"is not JSON ({str(error) or type(error).__name__}); correct it"
    return _check_object(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_object(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, dict):
        return 'is not a JSON object; each row must be like {"question": "..."}'
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate); correct it"
    return value


def _json_array(path: Path, longest: int) -> RawRows:
    with _open(path) as file:
        content = file.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise DataError(f"{path} {_NOT_UTF8}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno} is not JSON ({error.msg}, column {error.colno}); correct the file"
        ) from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply; correct the file") from None
    for number, value in enumerate(rows, 1):
        text = json.dumps(value)[: longest + 1]
        yield number, text, _too_long(longest) if len(text) > longest else _check_object(value)


def _csv_rows(path: Path, longest: int) -> RawRows:
    """Every column as text: a guessed type would turn 007 into 7, and an empty field into NaN."""
    csv.field_size_limit(max(longest, 1 << 17))
    with _open(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines)
        header = next(reader, [])
        if _SURROGATE.search("".join(header)):
            raise DataError(f"{path} line 1 {_NOT_UTF8}")
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, "", f"cannot be read ({error}); correct it"
                continue
            text = ",".join(fields)
            if not fields:
                continue
            if len(fields) != len(header):
                counts = f"{len(fields)} fields, the header has {len(header)}"
                yield number, text, f"cannot be read ({counts}); correct it"
            elif _SURROGATE.search(text):
                yield number, text, _NOT_UTF8
            elif sum(map(len, fields)) > longest:
                yield number, text, _too_long(longest)
            else:
                yield number, text, dict(zip(header, fields, strict=True))


def _parquet_rows(path: Path, longest: int) -> RawRows:
    """Streamed through `datasets`, which then keeps no cache: a file that changed is never answered from an
    old copy, and nothing lands in the user's home."""
    import datasets  # takes a second; only parquet needs it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # our one line says more about a damaged file
    with tempfile.TemporaryDirectory() as locks:  # for its lock files
        stream = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True, cache_dir=locks
        )
        for number, values in enumerate(stream, 1):
            size = sum(len(value) for value in values.values() if isinstance(value, str | bytes))
            yield number, str(values)[:SHOWN], _too_long(longest) if size > longest else values


READERS: dict[str, tuple[str, Callable[[Path, int], RawRows]]] = {  # what a row is called, and its reader
    ".json": ("row", _json_array),
    ".jsonl": ("line", _json_lines),
    ".csv": ("line", _csv_rows),
    ".parquet": ("row", _parquet_rows),
}
