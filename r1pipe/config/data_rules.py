"""What must be true of the data group: its kind reads the keys that are set, and the world has the values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

from r1pipe.config.architecture import Rules
from r1pipe.config.parts import DataConfig
from r1pipe.config.typed import shown
from r1pipe.core.errors import ConfigError

ROW_KEYS = (
    "bad_rows",
    "max_bad_rows",
    "longest_row",
)  # never empty, so only the command line can misplace them
SOURCES = ("reasoning", "general", "preferences", "labels")
USED = {  # data.kind -> the keys that it reads
    "world": ("tasks", "languages", "levels"),
    "files": ("path", *SOURCES, "substitutions", *ROW_KEYS),
    "reasoning_gym": ("tasks",),
}
WORLD: dict[str, tuple[str | int, ...]] = {
    "tasks": ("word", "countdown", "program"),
    "languages": ("en", "zh"),
    "levels": (1, 2, 3, 4),
}
STYLES = ("careful", "terse", "guess")
GENERAL_KINDS = ("writing", "facts", "identity", "translation", "safety")


def data_rules(data: DataConfig) -> Rules:
    for field in fields(data):
        if field.name not in ("name", "kind", *ROW_KEYS, *USED[data.kind]):
            yield not getattr(data, field.name), unused(data, field.name)
    if data.kind == "world":
        for key, known in WORLD.items():
            values, listed = getattr(data, key), ", ".join(map(str, known))
            yield bool(values), f"data.{key} is empty; choose from {listed}"
            for value in values:
                yield value in known, f"data.{key}: the bundled world has no {value}; choose from {listed}"


def share_rules(key: str, shares: Mapping[str, float], data: DataConfig, known: Sequence[str]) -> Rules:
    """Shares that something can be drawn by; `known`: the names that they may have in the bundled world."""
    yield not shares or sum(shares.values()) > 0, f"{key}={shown(shares)}: one share must be above 0"
    for name in shares if data.kind == "world" else ():
        yield name in known, f"{key}.{name}: the bundled world has none; choose from {', '.join(known)}"


def refuse_unused_row_keys(overrides: Iterable[str], data: DataConfig) -> None:
    """Raises ConfigError where the command line's keys include one about rows, and `data` reads no files."""
    for key in ROW_KEYS:
        if f"data.{key}" in overrides and key not in USED[data.kind]:
            raise ConfigError(unused(data, key))


def unused(data: DataConfig, key: str) -> str:
    """The line for a key that the chosen kind of data does not read."""
    remedy = "leave it out"
    if key in USED["files"]:
        remedy = "for files, choose a data set of files too, e.g. data=files data.path=FILE"
    elif key in USED["world"] and data.kind != "world":
        remedy += ", or choose data=world"
    return f"data.{key} is not used by data={data.name}; {remedy}"
