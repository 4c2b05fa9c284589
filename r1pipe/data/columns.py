"""Texts from a row's columns.

A role names a column (`question`), several joined by a line break (`Body + Question`), or the first that is
not empty (`choice_answer | answer`).
"""

import re
from typing import Any

from r1pipe.core.errors import DataError, nearest
from r1pipe.data.reading import Row

_SPEAKERS = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant"}
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "safe": True, "unsafe": False}
_KEY = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def text(row: Row, columns: str) -> str:
    """The text that `columns` names in a row, or "". Raises DataError where a column is missing."""
    for alternative in columns.split("|"):
        parts = [_plain(row, name.strip()) for name in alternative.split("+")]
        if any(parts):
            return "\n".join(filter(None, parts))
    return ""


def dialogue(row: Row, column: str) -> str:
    """A text, a turn ({from, value} or {role, content}) or several turns; a single turn gives its text."""
    value = _value(row, column)
    if isinstance(value, str):
        return value.strip()
    turns = [_turn(turn, column, row) for turn in (value if isinstance(value, list) else [value])]
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{_SPEAKERS[who]}: {said}" if who in _SPEAKERS else said for who, said in turns)


def flag(row: Row, column: str) -> bool:
    """True for true, 1 or safe; False for false, 0 or unsafe. Raises DataError on anything else."""
    value = str(_value(row, column)).strip().lower()
    if value not in _FLAGS:
        raise DataError(
            f"{row.where}: column {column} holds {value[:40]!r}; it must be one of {', '.join(_FLAGS)}"
        )
    return _FLAGS[value]


def substitute(value: str, texts: dict[str, str], row: Row) -> str:
    """`value` with each {{key}} replaced by its text. Raises DataError on an unknown key."""

    def put(match: re.Match[str]) -> str:
        if match[1] not in texts:
            raise DataError(f"{row.where}: {match[0]} has no text; set +data.substitutions.{match[1]}=TEXT")
        return texts[match[1]]

    return _KEY.sub(put, value)


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise DataError(f"{row.where} has no column {column}; {nearest(column, row.values)}")
    return row.values[column]


def _plain(row: Row, column: str) -> str:
    value = _value(row, column)
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # 43.0 in a JSON file of numbers is the answer 43
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise DataError(f"{row.where}: column {column} holds a {kind}, not text; name another column")
    return str(value).strip()


def _turn(turn: Any, column: str, row: Row) -> tuple[str, str]:
    for who, what in (("from", "value"), ("role", "content")):
        if isinstance(turn, dict) and isinstance(turn.get(who), str) and isinstance(turn.get(what), str):
            return turn[who], turn[what].strip()
    raise DataError(
        f"{row.where}: column {column} holds neither text nor turns {{from, value}} or {{role, content}}; "
        "name another column"
    )
