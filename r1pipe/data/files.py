"""Data from files: problems with gold answers, instructions with responses, preferences.

A file is described by one small YAML in conf/data/. Sample: conf/data/gsm8k.yaml on the row
{"question": "... How many in all?", "answer": "48/2 = <<48/2=24>>24 in May. ...\\n#### 72"} gives
Prompt(task="gsm8k", question="... How many in all?", answer="72") and a worked solution of it.
"""

import json
import math
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from r1pipe.chat.template import compose_response
from r1pipe.config import DataConfig, SourceConfig
from r1pipe.core.errors import ConfigError, DataError, nearest
from r1pipe.core.paths import SET_ASIDE
from r1pipe.core.types import GENERAL_TASKS, Demonstration, PreferencePair, Prompt, SafetyLabel
from r1pipe.data.columns import dialogue, flag, substitute, text
from r1pipe.data.reading import SHOWN, BadRow, Row, read_file
from r1pipe.data.source import SPLITS, Source
from r1pipe.data.world.content import make_prompt, split_of
from r1pipe.rewards import check_gold
from r1pipe.rewards.answers.gold import restore_backslashes
from r1pipe.rewards.language import LANGUAGES, language_of
from r1pipe.runs import data_files

T = TypeVar("T")

ROLES = {  # kind -> required roles, optional roles
    "reasoning": (("question", "answer"), ("solution",)),
    "general": (("question", "response"), ()),
    "preferences": (("question", "chosen", "rejected"), ()),
    "labels": (("question", "response", "safe"), ()),
}
SAFE, UNSAFE = "safe", "unsafe"
SUMMARY = {"en": "The answer is {}.", "zh": "答案是{}。"}
BOXED = r"\boxed{{{}}}"  # in any other language
CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator annotations, which are not part of the solution


@dataclass(frozen=True)
class Item:
    """One parsed row: the prompt, its texts by role, and its split."""

    prompt: Prompt
    texts: dict[str, str]
    split: str
    source: str  # provenance: file and row


def summary_of_answer(prompt: Prompt) -> str:
    """A summary that states the gold answer, in the prompt's language."""
    return SUMMARY.get(prompt.language, BOXED).format(prompt.answer)


class Files(Source):
    """The source of `data.kind=files`; a file is read at the first request for its kind."""

    def __init__(
        self, config: DataConfig, folder: Path | None = None, report: Callable[[str], None] | None = None
    ):
        """With data.bad_rows=set_aside, bad rows are written to `folder`; `report` takes a line on them."""
        self.config, self._folder, self._report = config, folder, report
        self._bad: list[BadRow] = []  # of the files read
        self._sources = _sources(config)
        self._items: dict[str, list[Item]] = {}  # kind -> its rows, once requested
        if not any(self._sources.values()):
            raise ConfigError(f"data={config.name} names no file; set data.path=FILE")
        self.hash, self.files = data_files.hashes(asdict(config))

    def items(self, kind: str) -> list[Item]:
        """All rows of one kind; a question that one source holds out is removed from every other source."""
        if kind not in self._items:
            sources = self._sources[kind]
            declared = {source.split for source in sources if source.split}
            items = [item for source in sources for item in self._read(kind, source, declared)]
            held_out = {_key(item.prompt): item.split for item in items if item.split != "train"}
            self._items[kind] = [
                item for item in items if held_out.get(_key(item.prompt), item.split) == item.split
            ]
        return self._items[kind]

    def _read(self, kind: str, source: SourceConfig, declared: set[str]) -> list[Item]:
        file = read_file(Path(source.path), self.config.longest_row)
        items, bad = [], [*file.bad]
        for row in file.rows:
            try:
                texts = _texts(kind, row, source)
                for role in texts:
                    texts[role] = substitute(texts[role], self.config.substitutions, row)
                items.append(_parse_item(kind, source, row, texts, declared))
            except DataError as error:
                bad.append(BadRow(row.path, row.number, str(error), str(row.values)[:SHOWN]))
        if bad:
            total = len(file.rows) + len(file.bad)
            self._set_aside(sorted(bad, key=lambda row: row.number), total)
        return items

    def _set_aside(self, bad: Sequence[BadRow], total: int) -> None:
        """The bad rows of one file of `total` rows, in their order.

        Raises DataError with data.bad_rows=refuse, and where there are more than data.max_bad_rows.
        """
        first, config = bad[0], self.config
        if config.bad_rows == "refuse":
            raise DataError(first.reason)
        counted = f"{len(bad):,} of {total:,} rows of {first.path}"
        if len(bad) > config.max_bad_rows * total:
            limit = f"data.max_bad_rows={config.max_bad_rows:g}"
            raise DataError(f"{counted} cannot be used, more than {limit}; the first: {first.reason}")
        self._bad += bad
        place = ""
        if self._folder:
            lines = [
                {"file": str(row.path), "line": row.number, "reason": row.reason, "text": row.text}
                for row in self._bad
            ]
            path = self._folder / SET_ASIDE
            temporary = path.with_name(f".{path.name}.{os.getpid()}")  # every rank writes the same file
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(path)
            place = f" (all in {path})"
        if self._report:
            self._report(f"{counted} set aside{place}; the first: {first.reason}")

    def _split(self, kind: str, split: str) -> list[Item]:
        return [item for item in self.items(kind) if item.split == split]

    def prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """Up to n distinct problems. Raises DataError where the train split has none."""
        items = _sample(_distinct(self._split("reasoning", split)), n, seed, f"prompts/{split}")
        if split == "train" and n and not items:
            raise DataError(f"data={self.config.name} has no problems to train on; try data=gsm8k")
        return [item.prompt for item in items]

    def rows(self, split: str) -> list[Demonstration]:
        return [
            Demonstration(item.prompt, item.texts.get("solution", ""), source=item.source)
            for item in self._split("reasoning", split)
        ]

    def demonstrations(
        self, n: int, seed: int, styles: dict[str, float], correct_only: bool
    ) -> list[Demonstration]:
        """Up to n worked solutions; all count as correct, and none has a known strategy."""
        solved = [item for item in self._split("reasoning", "train") if item.texts.get("solution")]
        if n and not solved:
            raise DataError(f"data={self.config.name} has no worked solutions; try data=gsm8k")
        demonstrations = []
        for item in _sample(solved, n, seed, "traces"):
            summary = summary_of_answer(item.prompt)
            response = compose_response(item.texts["solution"], summary)
            demonstrations.append(Demonstration(item.prompt, response, source=item.source))
        return demonstrations

    def general_prompts(self, split: str, n: int, seed: int, kinds: Mapping[str, float]) -> list[Prompt]:
        items = _distinct(self._split("general", split) + self._split("preferences", split))
        return [item.prompt for item in _sample_by_task(items, n, seed, kinds, f"general/{split}")]

    def general_demonstrations(self, n: int, seed: int, kinds: Mapping[str, float]) -> list[Demonstration]:
        items = _sample_by_task(self._split("general", "train"), n, seed, kinds, "general traces")
        return [Demonstration(item.prompt, item.texts["response"], source=item.source) for item in items]

    def preference_pairs(self, split: str, n: int, seed: int) -> list[PreferencePair]:
        items = _sample(self._split("preferences", split), n, seed, f"pairs/{split}")
        return [PreferencePair(item.prompt, item.texts["chosen"], item.texts["rejected"]) for item in items]

    def safety_labels(self, split: str, n: int, seed: int) -> list[SafetyLabel]:
        """Of a pair, the chosen answer counts as safe and the rejected one as unsafe."""
        labels = []
        for item in self._split("labels", split):
            texts = item.texts
            if "chosen" in texts:
                labels.append(SafetyLabel(item.prompt, texts["chosen"], True))
                labels.append(SafetyLabel(item.prompt, texts["rejected"], False))
            else:
                labels.append(SafetyLabel(item.prompt, texts["response"], texts["safe"] == SAFE))
        return _sample(labels, n, seed, f"labels/{split}")


def _sources(config: DataConfig) -> dict[str, list[SourceConfig]]:
    """The checked sources of each kind with their full paths; those without a path are left out."""
    result = {}
    for kind, paths in data_files.located(asdict(config)).items():
        sources: Sequence[SourceConfig] = getattr(config, kind)
        result[kind] = [replace(source, path=str(path)) for source, path in zip(sources, paths, strict=False)]
        for i, source in enumerate(result[kind]):
            _check_source(source, kind, f"data.{kind}[{i}]")
    return result


def roles(kind: str, source: SourceConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A source's required and optional roles; labels may be given as pairs."""
    return ROLES["preferences" if kind == "labels" and "chosen" in source.columns else kind]


def _check_source(source: SourceConfig, kind: str, where: str) -> None:
    required, optional = roles(kind, source)
    for role in source.columns:
        if role not in required + optional:
            raise ConfigError(f"{where}.columns.{role} is not a role; {nearest(role, required + optional)}")
    for role in required:
        if role not in source.columns:
            raise ConfigError(f"{where}.columns.{role} is missing; name the column that holds the {role}")
    if source.split not in (None, *SPLITS):
        raise ConfigError(f"{where}.split={source.split} is not a split; {nearest(source.split, SPLITS)}")
    if source.language not in ("auto", *LANGUAGES):
        remedy = nearest(source.language, ("auto", *LANGUAGES))
        raise ConfigError(f"{where}.language={source.language} is unknown; {remedy}")
    if (source.task in GENERAL_TASKS) == (kind == "reasoning"):
        must = "may not" if kind == "reasoning" else "must"
        raise ConfigError(f"{where}.task={source.task}: it {must} be one of {', '.join(GENERAL_TASKS)}")


def _texts(kind: str, row: Row, source: SourceConfig) -> dict[str, str]:
    """A row's texts by role: the gold answer alone, and the worked solution without annotations."""
    columns, mark = source.columns, source.answer_after
    if kind == "general":
        return {role: text(row, column) for role, column in columns.items()}
    if kind in ("preferences", "labels"):
        texts = {role: dialogue(row, column) for role, column in columns.items() if role != "safe"}
        if "safe" in columns:
            texts["safe"] = SAFE if flag(row, columns["safe"]) else UNSAFE
        return texts
    answer = text(row, columns["answer"])
    if mark is not None:
        if mark not in answer:
            raise DataError(f"{row.where}: {mark!r} is missing before the final answer; correct or remove it")
        answer = answer.rpartition(mark)[2].strip()
    texts = {"question": text(row, columns["question"]), "answer": restore_backslashes(answer)}
    if "solution" in columns:
        solution = text(row, columns["solution"])
        if mark and columns["solution"] == columns["answer"]:
            solution = solution.rpartition(mark)[0]
        texts["solution"] = CALCULATION.sub("", solution).strip()
    return texts


def _parse_item(kind: str, source: SourceConfig, row: Row, texts: dict[str, str], declared: set[str]) -> Item:
    """The row as an item; `declared` are the splits that whole files claim. Raises DataError."""
    for role in roles(kind, source)[0]:
        if not texts[role]:
            column = source.columns[role]
            raise DataError(f"{row.where}: the {role} (column {column}) is empty; fill it in or remove it")
    question, language, task = texts["question"], source.language, source.task
    if language == "auto":
        language = language_of(question)
    prompt = make_prompt(task, language, question, texts.get("answer", ""))
    if kind == "reasoning":
        try:
            check_gold(prompt)
        except DataError as error:
            raise DataError(f"{row.where}: {str(error).removeprefix(f'{prompt.id}: ')}") from None
    split = source.split or split_of(_key(prompt))
    if source.split is None and split in declared:
        split = "train"  # a file that declares this split provides all of it
    return Item(prompt, texts, split, f"{Path(source.path).name}:{row.number}")


def _key(prompt: Prompt) -> str:
    """What makes two questions the same: their words, whatever the spaces and capitals."""
    return " ".join(prompt.question.lower().split())


def _distinct(items: list[Item]) -> list[Item]:
    return list({_key(item.prompt): item for item in reversed(items)}.values())[::-1]


def _sample_by_task(
    items: list[Item], n: int, seed: int, kinds: Mapping[str, float], stream: str
) -> list[Item]:
    """Up to n of the items; `kinds` are the shares of the tasks among them (none: as they come)."""
    shares = {task: kinds[task] for task in kinds if any(item.prompt.task == task for item in items)}
    chosen = [] if shares else items
    for task, share in shares.items():
        of_task = [item for item in items if item.prompt.task == task]
        wanted = math.ceil(n * share / sum(shares.values()))
        chosen += _sample(of_task, wanted, seed, f"{stream}/{task}")
    return _sample(chosen, n, seed, stream)


def _sample(items: list[T], n: int, seed: int, stream: str) -> list[T]:
    return random.Random(f"{seed}/{stream}").sample(items, min(n, len(items)))
