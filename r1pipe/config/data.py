"""Where a stage's data comes from."""

from dataclasses import dataclass
from typing import Literal

from r1pipe.config.fields import Positive, Share, Strict


@dataclass
class SourceConfig(Strict):
    """One file of rows, read through `datasets`."""

    path: str  # json, jsonl, csv or parquet; .gz too; a relative path is looked up in `data.path`
    columns: dict[str, str]  # role -> column: question, answer, solution, response, safe, chosen, rejected
    answer_after: str | None  # mark after which the gold answer stands in the answer column, e.g. "####"
    language: str  # "en", "zh" or "auto" (by the share of Chinese characters)
    task: str  # the task name its rows are counted under
    split: str | None  # "train", "dev" or "test" for all its rows; null: by a hash of the question


@dataclass
class DataConfig(Strict):
    """What a stage learns from: the bundled world, files, or reasoning-gym."""

    name: str  # the file in conf/data/
    kind: Literal["world", "files", "reasoning_gym"]
    path: str | None  # files: the folder of the sources, or one file in place of the first source
    tasks: list[str]  # world: reasoning tasks; reasoning_gym: task names
    languages: list[str]  # world: languages
    levels: list[int]  # world: difficulty levels that prompts are drawn from
    reasoning: list[SourceConfig]  # files: problems with gold answers and, maybe, worked solutions
    general: list[SourceConfig]  # files: instructions with answers
    preferences: list[SourceConfig]  # files: chosen and rejected answers
    bad_rows: Literal["refuse", "set_aside"]  # files: what to do with a row that cannot be used
    max_bad_rows: Share  # share of a file's rows that may be set aside; above it the file is refused
    longest_row: Positive  # bytes of a row; a longer one cannot be used
    labels: list[SourceConfig]  # files: responses labelled safe or not, or pairs to be read as such
    substitutions: dict[str, str]  # files: texts to put in place of {{key}} in rows (identity data)
