"""Where a stage's data comes from: its kind reads the keys that are set, and the world has the values."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from r1pipe.config.fields import Positive, Rules, Share, Strict, shown
from r1pipe.core.errors import ConfigError

ROW_KEYS = ("bad_rows", "max_bad_rows", "longest_row")  # never empty: only the command line can misplace them
SOURCES = ("reasoning", "general", "preferences", "labels")
USED = {  # data.kind -> the keys that it reads
    "world": ("licence", "tasks", "languages", "levels", "unseen", "thorough"),
    "files": ("path", "licence", *SOURCES, "substitutions", *ROW_KEYS),
    "reasoning_gym": ("licence", "tasks"),
}
LEVELS = (1, 2, 3, 4)
WORLD: dict[str, tuple[str | int, ...]] = {
    "tasks": ("word", "countdown", "program", "judging"),
    "languages": ("en", "zh"),
    "levels": LEVELS,
}
STYLES = ("careful", "terse", "guess", "thorough")


LayoutName = Literal[  # the keys of r1pipe.data.layouts.LAYOUTS
    "preferences", "labels", "verl", "code", "options", "table", "conversation", "alpaca", "instructions"
]


@dataclass
class SourceConfig(Strict):
    """Rows of one file, of a folder of shards, or of a data set on the hub."""

    path: str  # a relative path is looked up in `data.path`; ".": all of `data.path`
    language: str  # en, zh or another code; auto: as each question is written
    task: str  # the task name its rows are counted under
    columns: dict[str, str] = dataclasses.field(default_factory=dict)  # role -> column; {}: by the layout
    answer_after: str | None = None  # mark before the gold answer in the answer column, e.g. "####"
    split: str | None = None  # "train", "dev" or "test" for all its rows; null: by a hash of the question
    layout: LayoutName | None = None  # the layout of its rows; null: inferred from their columns
    answer_form: str | None = None  # the form of all gold answers, e.g. number; null: as each is written
    prompts: bool = True  # false: its problems are not asked; their solutions are there to learn from
    licence: str | None = None  # of its rows, for the record, e.g. MIT; null: data.licence


@dataclass
class DataConfig(Strict):
    """What a stage learns from: the bundled world, files, or reasoning-gym."""

    name: str  # the file in conf/data/
    kind: Literal["world", "files", "reasoning_gym"]  # where problems come from
    path: str | None  # files: the folder of the sources; or a file or OWNER/NAME in place of the first one
    tasks: list[str]  # world: reasoning tasks; reasoning_gym: task names
    languages: list[str]  # world: languages
    levels: list[int]  # world: difficulty levels of prompts; the pre-training corpus has its own shares
    reasoning: list[SourceConfig]  # files: problems with gold answers or tests, and maybe solutions
    general: list[SourceConfig]  # files: instructions with answers
    preferences: list[SourceConfig]  # files: chosen and rejected answers
    bad_rows: Literal["refuse", "set_aside"]  # files: what to do with a row that cannot be used
    max_bad_rows: Share  # share of a file's rows that may be set aside; above it the file is refused
    longest_row: Positive  # bytes of a row; a longer one cannot be used
    labels: list[SourceConfig]  # files: responses labelled safe or not, or pairs to be read as such
    substitutions: dict[str, str]  # files: texts to put in place of {{key}} in rows (identity data)
    licence: str | None = None  # of what is read or generated, for the record, e.g. MIT; null: unknown
    unseen: bool = False  # world: problems with names, things and wordings that are trained on nowhere else
    thorough: bool = False  # world: a few solutions of Countdown keep trying after a miss


def data_rules(data: DataConfig) -> Rules:
    for field in fields(data):
        is_read = field.name in ("name", "kind", *ROW_KEYS, *USED[data.kind])
        if getattr(data, field.name) and not is_read:
            yield unused(data, field.name)
    for key, known in WORLD.items() if data.kind == "world" else ():
        values, listed = getattr(data, key), ", ".join(map(str, known))
        if not values:
            yield f"data.{key} is empty; choose from {listed}"
        for value in values:
            if value not in known:
                yield f"data.{key}: the bundled world has no {value}; choose from {listed}"


def share_rules(key: str, shares: Mapping[str, float], data: DataConfig, known: Sequence[str]) -> Rules:
    """Shares that something can be drawn by; `known`: the names that they may have in the bundled world."""
    if shares and sum(shares.values()) <= 0:
        yield f"{key}={shown(shares)}: one share must be above 0"
    for name in shares:
        if data.kind == "world" and name not in known:
            yield f"{key}.{name}: the bundled world has none; choose from {', '.join(known)}"


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
