"""Test cases as public data sets write them, made one of three lists.

calls     [[[argument, ...], expected], ...]
programs  [[standard input, standard output], ...]
asserts   Python text, or [assert line, ...]
"""

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from r1pipe.core import python_source
from r1pipe.core.errors import DataError

MAX_BYTES = 256 << 20  # of LiveCodeBench's private tests, unpacked
# What a pickle of one str holds; nothing among them calls or imports anything.
_OF_A_STRING = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
_STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_FUNCTION_TYPES = ("functional", "function_call")


class Cases(NamedTuple):
    """Test cases of a task."""

    tests: list[Any] | str
    function: str = ""  # the function's name, where the cases have it
    either: bool = False  # [x] as a call's expected result stands for x or [x]


def read_cases(value: Any) -> Cases:
    """The cases in a column: lists, JSON text of them, or Python text. Raises DataError."""
    value = loaded(value)
    if isinstance(value, Mapping) and "test_cases" in value:
        language = value.get("language") or "python"
        if str(language).lower() not in ("python", "python3"):
            raise DataError(f"its tests are for {language}; only Python programs are run")
        return read_cases(value["test_cases"])
    if isinstance(value, Mapping):
        return _cases_of_columns(value)
    if isinstance(value, str):
        return Cases(value)
    if not isinstance(value, Sequence) or not value:
        raise DataError("it has no tests; write one")
    if all(isinstance(each, str) for each in value):
        return Cases(list(value))
    if all(isinstance(each, Mapping) for each in value):
        return _cases_of_mappings(value)
    if not all(isinstance(each, list | tuple) and len(each) == 2 for each in value):
        raise DataError("a test is no [[arguments...], expected] and no [stdin, stdout]; correct it")
    return Cases([list(each) for each in value])


def loaded(value: Any) -> Any:
    """The value of JSON text, or of a Python literal as some data sets have it; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return python_source.literal(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def join_cases(parts: Sequence[Cases]) -> Cases:
    """The cases of several columns. Raises DataError where they are of different forms."""
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part.tests, str) for part in parts) or len({part.function for part in parts}) > 1:
        raise DataError("its columns of tests are of different forms; keep one")
    tests = [test for part in parts for test in part.tests]
    return Cases(tests, parts[0].function if parts else "", any(part.either for part in parts))


def _cases_of_columns(value: Mapping[str, Any]) -> Cases:
    """{"inputs": [...], "outputs": [...], "fn_name"?} (APPS, TACO); `input`, `output` in CodeContests."""
    inputs, outputs = (value.get(f"{name}s", value.get(name)) for name in ("input", "output"))
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise DataError("its tests have no lists `inputs` and `outputs`; correct them")
    if len(inputs) != len(outputs):
        raise DataError(f"its tests have {len(inputs)} inputs but {len(outputs)} outputs; correct them")
    name = value.get("fn_name") or ""
    rows = [{"input": i, "output": o, "fn_name": name} for i, o in zip(inputs, outputs, strict=True)]
    return _cases_of_mappings(rows) if rows else Cases([], name)


def _cases_of_mappings(rows: Sequence[Mapping[str, Any]]) -> Cases:
    """[{"input", "output", "type" or "testtype"?, "fn_name"?}]: programs; calls where one says so, or where
    the input is no text."""
    tests, names, either = [], set(), False
    for number, row in enumerate(rows, 1):
        metadata = loaded(row.get("metadata"))
        name = row.get("fn_name") or (metadata.get("func_name") if isinstance(metadata, Mapping) else "")
        kind = row.get("testtype") or row.get("type")
        is_call = bool(name) or kind in _FUNCTION_TYPES or (kind is None and not _is_text(row.get("input")))
        if row.get("input") is None or "output" not in row or (row["output"] is None and not is_call):
            raise DataError(f"test {number} lacks its input or output; correct it")
        names.add((is_call, str(name or "")))
        try:
            tests.append(_call(row) if is_call else [_text(row["input"]), _text(row["output"])])
        except (ValueError, RecursionError) as error:
            raise DataError(f"test {number} is not JSON ({error}); correct it") from None
        either |= is_call and isinstance(row["input"], list)
    if len(names) > 1:
        raise DataError("its tests call different functions, or some call none; keep one form")
    [(_, function)] = names
    return Cases(tests, function, either)


def _call(row: Mapping[str, Any]) -> list[Any]:
    """Arguments and result: JSON values, one a line (LiveCodeBench), or lists as they are (APPS)."""
    given, expected = row["input"], row["output"]
    if not isinstance(given, str):
        return [given if isinstance(given, list) else [given], expected]
    arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
    return [arguments, json.loads(expected) if isinstance(expected, str) else expected]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    )


def _text(value: Any) -> str:
    """Text of a standard stream; APPS has lists of lines, too."""
    return "\n".join(map(_text, value)) if isinstance(value, list) else str(value)


def unpacked(text: str) -> list[Any]:
    """LiveCodeBench's private tests: a list as JSON text, pickled, zipped, in base64. Nothing is unpickled.

    Raises DataError where the pickle is not one string of such text.
    """
    opener, steps, too_long = zlib.decompressobj(), [], False
    try:
        data = opener.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
        too_long = bool(opener.unconsumed_tail)
        steps = [(code.name, value) for code, value, _ in pickletools.genops(data)] if opener.eof else []
    except (binascii.Error, zlib.error, ValueError, IndexError):
        pass
    if too_long:
        raise DataError(f"its private tests unpack to more than {MAX_BYTES >> 20} MB; leave it out")
    strings = [value for name, value in steps if name in _STRINGS]
    only_these = all(name in _OF_A_STRING | _STRINGS for name, _ in steps)
    value = loaded(strings[0]) if len(strings) == 1 and only_these else None
    if not isinstance(value, list):
        raise DataError("its private tests are neither JSON nor a packed list; download the file again")
    return value
