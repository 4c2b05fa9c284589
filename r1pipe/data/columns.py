"""Texts from a row's columns.

A role names a column (`question`), several joined by a line break (`Body + Question`), or the first that is
not empty (`choice_answer | answer`). Dots lead into nested columns (`reward_model.ground_truth`,
`messages.0.content`). What holds braces is a text with columns in it (`{text}
Who is “{span}”?`).
"""

import math
import re
from typing import Any

from r1pipe.core.errors import DataError, nearest
from r1pipe.data.reading import Row

_FLAGS = {"true": True, "false": False, "1": True, "0": False, "safe": True, "unsafe": False}
_PLACE = re.compile(r"\{([^{}]+)\}")
_KEY = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def text(row: Row, columns: str) -> str:
    """The text that `columns` names in a row, or "". Raises DataError where a column is missing."""
    if _PLACE.search(columns):
        return _PLACE.sub(lambda place: _plain(row, place[1].strip()), columns)
    for alternative in columns.split("|"):
        parts = [_plain(row, name) for name in names(alternative)]
        if any(parts):
            return "\n".join(filter(None, parts))
    return ""


def is_one(columns: str) -> bool:
    """Whether they name one column, so that it may hold something else than text."""
    return not any(mark in columns for mark in "+|{")


def names(columns: str) -> list[str]:
    """The columns that are joined."""
    return [name.strip() for name in columns.split("+")]


def flag(row: Row, column: str) -> bool:
    """True for true, 1 or safe; False for false, 0 or unsafe. Raises DataError on anything else."""
    found = str(value(row, column)).strip().lower()
    if found not in _FLAGS:
        raise DataError(
            f"{row.where}: column {column} holds {found[:40]!r}; it must be one of {', '.join(_FLAGS)}"
        )
    return _FLAGS[found]


def substitute(content: str, texts: dict[str, str], row: Row) -> str:
    """`content` with each {{key}} replaced by its text. Raises DataError on an unknown key."""

    def put(match: re.Match[str]) -> str:
        if match[1] not in texts:
            raise DataError(f"{row.where}: {match[0]} has no text; set +data.substitutions.{match[1]}=TEXT")
        return texts[match[1]]

    return _KEY.sub(put, content)


def value(row: Row, column: str) -> Any:
    """What a column holds; None where a nested one ends early. Raises DataError where it is missing."""
    if column in row.values:
        return row.values[column]
    first, *parts = column.split(".")
    if first not in row.values or not parts:
        raise DataError(f"{row.where} has no column {column}; {nearest(column, row.values)}")
    found = row.values[first]
    for part in parts:
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.lstrip("-").isdigit() and -len(found) <= int(part) < len(found):
            found = found[int(part)]
        elif found is None:
            return None
        else:
            raise DataError(f"{row.where}: column {first} holds no {column}; correct the name or the row")
    return found


def _plain(row: Row, column: str) -> str:
    found = value(row, column)
    if found is None:
        return ""
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        kind = type(found).__name__
        raise DataError(f"{row.where}: column {column} holds a {kind}, not text; name another column")
    return plain_text(found)


def plain_text(found: str | int | float) -> str:
    if isinstance(found, float) and math.isnan(found):
        return ""  # pandas' missing number
    if isinstance(found, float) and found.is_integer():
        return str(int(found))  # 43.0 in a JSON file of numbers is the answer 43
    return str(found).strip()
