"""Rows of a data file: json, jsonl and csv by row, parquet through `datasets`; what is wrong is told by line.

`datasets` gives each column of a JSON or CSV file one type and refuses the whole file for one odd row; here a
bad row is one bad row, with its line and the reason, and whoever reads decides what becomes of it.
"""

import csv
import difflib
import gzip
import io
import json
import logging
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow

from r1pipe.core.errors import DataError
from r1pipe.runs import heartbeat

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
LONGEST = 1_000_000  # bytes of a row, where the config does not say
SHOWN = 500  # characters that are kept of a bad row
# What the readers raise on a file that is not what its name says.
_UNREADABLE = (ValueError, OSError, EOFError, StopIteration, zlib.error, pyarrow.ArrowException)


@dataclass(frozen=True)
class Row:
    """One row with its place, so that whatever is wrong with it can be told by file and line."""

    values: dict[str, Any]
    path: Path
    number: int  # from 1: the line that it begins in, or in formats whose rows are not lines, the row
    unit: str = "line"

    @property
    def where(self) -> str:
        """`file.jsonl line 12`; `row 12` in formats whose rows are not lines."""
        return f"{self.path} {self.unit} {self.number}"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    path: Path
    number: int
    reason: str  # file, line and remedy included
    text: str  # its beginning


@dataclass
class TolerantRead:
    """What a file holds."""

    rows: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


class _Bad(Exception):
    """Why a row is none."""


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Raises DataError naming file, line and remedy of the first that cannot be read."""
    sifted = read_tolerant(path)
    if sifted.bad:
        raise DataError(sifted.bad[0].reason)
    return sifted.rows


def read_tolerant(path: Path, longest: int = LONGEST) -> TolerantRead:
    """All rows of a file, those apart that cannot be read or are longer than `longest` bytes.

    Raises DataError where the file as a whole cannot be read or holds nothing.
    """
    if not path.is_file():
        raise DataError(_missing(path))
    kind = FORMATS.get(_suffix(path))
    if kind is None:
        raise DataError(f"{path} is of an unknown format; give one of {', '.join(FORMATS)}, plain or .gz")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; download it again")
    try:
        if kind == "csv":
            found = _sift(path, _csv_rows(path, longest))
        elif kind == "parquet":
            found = _sift(path, _table_rows(path, longest))
        elif _is_lines(path):
            found = _sift(path, _json_lines(path, longest))
        else:
            found = _sift(path, _json_array(path, longest), unit="row")
    except DataError:
        raise
    except _UNREADABLE as error:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path} cannot be read ({detail}); download it again") from None
    if not found.rows and not found.bad:
        raise DataError(f"{path} holds no rows; download it again")
    return found


Found = Iterator[tuple[int, bytes | str, dict[str, Any] | _Bad]]  # number, the row as text, its values


def _sift(path: Path, found: Found, unit: str = "line") -> TolerantRead:
    """Every row has every column of the file: null where it lacks one, as in a table."""
    sifted, columns = TolerantRead(), dict[str, None]()
    unit = "row" if FORMATS[_suffix(path)] == "parquet" else unit
    for number, text, values in found:
        heartbeat.tick()
        if isinstance(values, _Bad):
            shown = text.decode(errors="replace") if isinstance(text, bytes) else text
            sifted.bad.append(BadRow(path, number, f"{path} {unit} {number} {values}", shown[:SHOWN]))
        else:
            columns |= dict.fromkeys(values)
            sifted.rows.append(Row(values, path, number, unit))
    nothing = dict.fromkeys(columns)
    sifted.rows = [Row({**nothing, **row.values}, path, row.number, unit) for row in sifted.rows]
    return sifted


def _json_lines(path: Path, longest: int) -> Found:
    with _open(path) as file:
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest and not line.endswith(b"\n"):
                while (more := file.readline(1 << 20)) and not more.endswith(b"\n"):
                    pass
                yield number, line[:SHOWN], _too_long(longest)
            elif line.strip():
                yield number, line, _parsed(line)


def _too_long(longest: int) -> _Bad:
    return _Bad(f"is longer than data.longest_row={longest} bytes; shorten it, or raise that")


def _parsed(line: bytes) -> dict[str, Any] | _Bad:
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError:
        return _Bad("is not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return _Bad(f"is not JSON ({error.msg}, column {error.colno}); correct it")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, NaN; [[[[...
        return _Bad(f"is not JSON ({str(error) or type(error).__name__}); correct it")
    return _whole(value)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _whole(value: Any) -> dict[str, Any] | _Bad:
    if not isinstance(value, dict):
        return _Bad('is no JSON object; each row must be like {"question": "..."}')
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return _Bad("holds half a character (a lone surrogate); correct it")
    return value


def _json_array(path: Path, longest: int) -> Found:
    with _open(path) as file:
        content = file.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno} is not JSON ({error.msg}, column {error.colno}); correct the file"
        ) from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply; correct the file") from None
    for number, value in enumerate(rows, 1):
        text = json.dumps(value)[: longest + 1]
        yield number, text, _too_long(longest) if len(text) > longest else _whole(value)


def _csv_rows(path: Path, longest: int) -> Found:
    """Every column as text: a guessed type would turn 007 into 7, and an empty field into NaN."""
    csv.field_size_limit(max(longest, 1 << 17))
    with _open(path) as file:
        reader = csv.reader(
            io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        )
        header = next(reader, [])
        if any(_is_escaped(name) for name in header):
            raise DataError(f"{path} line 1 is not UTF-8; save the file as UTF-8")
        while True:
            begins = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield begins, "", _Bad(f"cannot be read ({error}); correct it")
                continue
            if fields:
                yield begins, ",".join(fields), _record(header, fields, longest)


def _record(header: list[str], fields: list[str], longest: int) -> dict[str, Any] | _Bad:
    if len(fields) != len(header):
        return _Bad(f"cannot be read ({len(fields)} fields, the header has {len(header)}); correct it")
    if any(map(_is_escaped, fields)):
        return _Bad("is not UTF-8; save the file as UTF-8")
    if sum(map(len, fields)) > longest:
        return _too_long(longest)
    return dict(zip(header, fields, strict=True))


def _is_escaped(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _table_rows(path: Path, longest: int) -> Found:
    """Streamed, so that `datasets` keeps no cache: nothing lands in the user's home, and a file that changed
    is never answered from an old copy."""
    import datasets  # takes a second; only parquet needs it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would print on a bad file is told better here
    with tempfile.TemporaryDirectory() as locks:  # it still wants a place for its lock files
        stream = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True, cache_dir=locks
        )
        for number, values in enumerate(stream, 1):
            size = sum(len(value) for value in values.values() if isinstance(value, str | bytes))
            yield number, str(values)[:SHOWN], _too_long(longest) if size > longest else values


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; give a file in it"
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder; set data.path=FILE or FOLDER"
    similar = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    guess = f"did you mean {similar[0]}? Set" if similar else "set"
    return f"{path} does not exist; {guess} data.path=FILE, or the folder that holds it"


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _is_lines(path: Path) -> bool:
    """Whether each row is one line: .jsonl, and .json files that are jsonl in truth."""
    if _suffix(path) == ".jsonl":
        return True
    with _open(path) as file:
        return not file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
