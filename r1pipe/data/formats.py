"""Rows of one data file: json, jsonl, csv, tsv, parquet or arrow, plain or compressed by gzip or zstd.

What a file is, its first bytes tell; its name decides only where they do not (csv, tsv, damaged files).
"""

import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from r1pipe.core.errors import DataError
from r1pipe.runs.data_files import COMPRESSIONS, data_suffix

SHOWN = 500  # characters of a bad row that are kept
_HEAD = 4096  # bytes by which a format is recognised
_NOT_UTF8 = "is not UTF-8; save the file as UTF-8"
HALF = re.compile("[\ud800-\udfff]")  # a character's half: no text is encoded with it
_ZSTD = b"\x28\xb5\x2f\xfd"
_ARROW_FILE, _ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_ARRAY, _OBJECT = re.compile(rb"\[\s*[{\]]"), re.compile(rb'\{\s*["}]')
_DELIMITERS = ",\t;"
_LISTS_OF_ROWS = ("data", "rows", "examples", "instances", "items", "samples", "problems", "questions")
_END = "\ud800"  # a line after the last of a csv file: no file can hold it

# Number, the row as text, and its values; or, in place of the values, why it cannot be used.
RawRows = Iterator[tuple[int, str, dict[str, Any] | str]]


def detect(path: Path) -> tuple[str, str]:
    """A file's format (a key of READERS, or "" where it is unknown) and compression (.gz, .zst or "").

    Raises what the decompressors raise on a damaged file.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    compression = ".gz" if head.startswith(b"\x1f\x8b") else ".zst" if head.startswith(_ZSTD) else ""
    if compression:
        with open_data_file(path, compression) as stream:
            head = stream.read(_HEAD)
    named = data_suffix(path)
    found = _format_of(head, named)
    if named == ".json" and found == ".jsonl" and _is_one_line(path, compression):
        found = ".json"  # {"version": 1, "data": [...]}
    if found:
        return found, compression
    if not compression and path.suffix in COMPRESSIONS:
        compression = path.suffix  # opening it says what is wrong
    return (".jsonl" if named == ".json" else named), compression


def _is_one_line(path: Path, compression: str) -> bool:
    with open_data_file(path, compression) as file:
        file.readline()
        return not file.read(1)


def _format_of(head: bytes, named: str) -> str:
    """The format that a file's first bytes show, or ""."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith((_ARROW_FILE, _ARROW_STREAM)):
        return ".arrow"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_indented = text.split(b"\n", 1)[0].strip() == b"{"  # one object over several lines
    if _ARRAY.match(text) or (named == ".json" and (text.startswith(b"[") or is_indented)):
        return ".json"
    return ".jsonl" if _OBJECT.match(text) else ""


def open_data_file(path: Path, compression: str) -> BinaryIO:
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _json_lines(path: Path, compression: str, longest: int) -> RawRows:
    with open_data_file(path, compression) as file:
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest and not line.endswith(b"\n"):
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass
                yield number, line[:SHOWN].decode(errors="replace"), too_long(longest)
            elif line.strip():
                yield number, line[: 4 * SHOWN].decode(errors="replace"), _parse_json(line)


def too_long(longest: int) -> str:
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
    except RecursionError:
        return "is nested too deeply; correct it"
    return value


def _json_document(path: Path, compression: str, longest: int) -> RawRows:
    """An array of rows, an object with one list of rows in it ({"version": 1, "data": [...]}), or one row."""
    with open_data_file(path, compression) as file:
        content = file.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise DataError(f"{path} {_NOT_UTF8}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno} is not JSON ({error.msg}, column {error.colno}); correct the file"
        ) from None
    except (ValueError, RecursionError) as error:  # NaN, a number of thousands of digits; [[[[...
        raise DataError(f"{path} is not JSON ({error}); correct the file, or make it JSONL") from None
    if isinstance(rows, dict):
        rows = _rows_in(rows)
    for number, value in enumerate(rows, 1):
        text = json.dumps(value)[: longest + 1]
        yield number, text, too_long(longest) if len(text) > longest else _check_object(value)


def _rows_in(document: dict[str, Any]) -> list[Any]:
    """The one list of rows in an object; the object itself where it is a row, which may have lists, too."""
    lists = {key: value for key, value in document.items() if isinstance(value, list) and value}
    lists = {key: value for key, value in lists.items() if all(isinstance(each, dict) for each in value)}
    if len(lists) != 1:
        return [document]
    [(name, rows)] = lists.items()
    are_turns = any("role" in each or "from" in each for each in rows)
    holds_rows = len(document) == 1 or name.lower() in _LISTS_OF_ROWS
    return rows if holds_rows and not are_turns else [document]


def _csv_rows(path: Path, compression: str, longest: int) -> RawRows:
    """Every column as text: a guessed type would turn 007 into 7, and an empty field into NaN."""
    csv.field_size_limit(min(max(longest, 1 << 17), 2**31 - 1))
    with open_data_file(path, compression) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        first = lines.readline()
        found = [mark for mark in _DELIMITERS if mark in first]
        delimiter = "\t" if data_suffix(path) == ".tsv" else [*found, ","][0]
        reader = csv.reader(itertools.chain([first], lines, [_END]), delimiter=delimiter)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise DataError(f"{path} line 1 cannot be read ({error}); correct it") from None
        if HALF.search("".join(header)):
            raise DataError(f"{path} line 1 {_NOT_UTF8}")
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{path} line 1 names the column {twice!r} twice; rename one of them")
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, "", f"cannot be read ({error}); correct it"
                continue
            if fields == [_END]:
                return
            if fields and fields[-1].endswith(_END):
                raise DataError(f"{path} line {number} opens a quotation mark that is never closed; close it")
            if fields:
                text = ",".join(fields)
                yield number, text, _csv_row(header, fields, text, longest)


def _csv_row(header: list[str], fields: list[str], text: str, longest: int) -> dict[str, Any] | str:
    if len(fields) != len(header):
        return f"cannot be read ({len(fields)} fields, the header has {len(header)}); correct it"
    if HALF.search(text):
        return _NOT_UTF8
    if sum(map(len, fields)) > longest:
        return too_long(longest)
    return dict(zip(header, fields, strict=True))


def _parquet_rows(path: Path, compression: str, longest: int) -> RawRows:
    with open_data_file(path, compression) as file:
        seekable = io.BytesIO(file.read()) if compression else file
        yield from rows_of(pyarrow.parquet.ParquetFile(seekable).iter_batches(batch_size=256), longest)


def _arrow_rows(path: Path, compression: str, longest: int) -> RawRows:
    """An Arrow stream, as `datasets` writes it, or an Arrow file (Feather)."""
    with open_data_file(path, compression) as file:
        content = (
            pyarrow.py_buffer(file.read()) if compression else pyarrow.memory_map(str(path)).read_buffer()
        )
    if content[:6].to_pybytes() == _ARROW_FILE:
        table = pyarrow.ipc.open_file(content)
        yield from rows_of(map(table.get_batch, range(table.num_record_batches)), longest)
    else:
        yield from rows_of(pyarrow.ipc.open_stream(content), longest)


def rows_of(batches: Iterable[Any], longest: int) -> RawRows:
    """The rows of Arrow batches or tables."""
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield _check_size(number, values, longest)


def _check_size(number: int, values: dict[str, Any], longest: int) -> tuple[int, str, dict[str, Any] | str]:
    """A row of typed columns, refused where it is too long."""
    sizes = (len(v if isinstance(v, str | bytes) else str(v)) for v in values.values() if v is not None)
    is_long = sum(sizes) > longest
    return number, str(values)[:SHOWN] if is_long else "", too_long(longest) if is_long else values


READERS: dict[str, tuple[str, Callable[[Path, str, int], RawRows]]] = {  # what a row is called, its reader
    ".json": ("row", _json_document),
    ".jsonl": ("line", _json_lines),
    ".csv": ("line", _csv_rows),
    ".tsv": ("line", _csv_rows),
    ".parquet": ("row", _parquet_rows),
    ".arrow": ("row", _arrow_rows),
}
