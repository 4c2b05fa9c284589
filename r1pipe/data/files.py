"""Data from files: problems with gold answers, instructions with responses, preferences.

A file is described by one small YAML in conf/data/, or by the columns that it has (layouts.py). Sample:
conf/data/gsm8k.yaml on the row
{"question": "... How many in all?", "answer": "48/2 = <<48/2=24>>24 in May. ...\\n#### 72"} gives
Prompt(task="gsm8k", question="... How many in all?", answer="72") and a worked solution of it.
"""

import json
import math
import os
import random
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from r1pipe.chat.template import compose_response
from r1pipe.config import DataConfig, SourceConfig
from r1pipe.core.errors import ConfigError, DataError, nearest
from r1pipe.core.paths import SET_ASIDE
from r1pipe.core.types import GENERAL_TASKS, Demonstration, PreferencePair, Prompt, SafetyLabel
from r1pipe.data.formats import SHOWN
from r1pipe.data.items import ROLES, SAFE, Item, key, parse_item, roles, without_repeated_questions
from r1pipe.data.layouts import find_layout
from r1pipe.data.reading import BadRow, FileRows, read_rows
from r1pipe.data.screening import Screening, screened_item
from r1pipe.data.source import SPLITS, Source
from r1pipe.rewards.answers.gold import Form
from r1pipe.rewards.language import LANGUAGES
from r1pipe.runs import data_files

T = TypeVar("T")

SUMMARY = {"en": "The answer is {}.", "zh": "答案是{}。"}
BOXED = r"\boxed{{{}}}"  # in any other language
TASKS = {"general": "writing", "preferences": "writing", "labels": "safety"}  # of data that is no problems
EQUAL = "the chosen and the rejected answer are the same, so the pair teaches nothing"


def summary_of_answer(prompt: Prompt) -> str:
    """A summary that states the gold answer, in the prompt's language."""
    return SUMMARY.get(prompt.language, BOXED).format(prompt.answer)


class Files(Source):
    """The source of `data.kind=files`; a file is read at the first request for its kind."""

    def __init__(
        self,
        config: DataConfig,
        folder: Path | None = None,
        report: Callable[[str], None] | None = None,
        screening: Screening | None = None,
    ):
        """With data.bad_rows=set_aside, bad rows are written to `folder`; `report` takes a line on them.
        `screening` looks over every row that is read, and may drop or rewrite it.

        A source whose columns are not named is read at once, since its layout decides what kind it gives.
        """
        self.config, self._folder, self._report, self.screening = config, folder, report, screening
        self.set_aside: list[BadRow] = []  # of the files read
        self._read: dict[str, FileRows] = {}  # path -> rows that are not parsed yet
        self.described: dict[str, str] = {}  # path -> the layout that it was found to have
        self.sources: dict[str, list[SourceConfig]] = {kind: [] for kind in data_files.KINDS}
        for kind, source, where in _sources(config):
            gives, whole = (kind, source) if _is_mapped(source) else self._recognise(kind, source)
            _check_source(whole, gives, where)
            if data_files.hub_name(Path(source.path)) and source.path not in self._read:
                self._read[source.path] = read_rows(
                    Path(source.path), config.longest_row
                )  # then it is hashed
            self.sources[gives].append(whole)
        self._items: dict[str, list[Item]] = {}  # kind -> its rows, once requested
        if not any(self.sources.values()):
            raise ConfigError(f"data={config.name} names no file; set data.path=FILE")
        self.layouts = list(self.described.values())
        self.hash, self.files = data_files.hashes(asdict(config))

    def _recognise(self, kind: str, source: SourceConfig) -> tuple[str, SourceConfig]:
        """The kind that a source gives by its layout, and the source with its columns. Raises DataError."""
        file = self._read[source.path] = read_rows(Path(source.path), self.config.longest_row)
        if not file.rows:
            raise DataError(file.bad[0].reason)
        try:
            found = find_layout(file.rows, kind, source.layout, source.columns)
        except DataError as error:
            listed = ",".join(f"{role}:COLUMN" for role in ROLES[kind][0])
            keys = f"path:.,language:{source.language},task:{source.task},columns:{{{listed}}}"
            override = shlex.quote(f"data.{kind}=[{{{keys}}}]")
            raise DataError(f"{source.path}: {error}, e.g. {override}") from None
        origin = "named" if source.layout else "inferred from its columns"
        listed = ", ".join(f"{role}={column}" for role, column in found.columns.items()) or "code tasks"
        counted = f"{len(file.rows) + len(file.bad):,} rows of {file.format}"
        self.described[source.path] = f"{source.path}: {counted}, layout {found.name} ({origin}): {listed}"
        mark = source.answer_after or found.answer_after
        task = source.task if found.kind == kind else TASKS.get(found.kind, source.task)
        return found.kind, replace(
            source, columns=found.columns, layout=found.name, answer_after=mark, task=task
        )

    def items(self, kind: str) -> list[Item]:
        """All rows of one kind; a question that one source holds out is removed from every other source."""
        if kind not in self._items:
            sources = self.sources[kind]
            paths, longest = [source.path for source in sources], self.config.longest_row
            files = [self._read.pop(p) if p in self._read else read_rows(Path(p), longest) for p in paths]
            declared = {source.split for source in sources if source.split}
            declared |= {row.split for file in files for row in file.rows if row.split}
            parsed = zip(sources, files, strict=True)
            items = [item for source, file in parsed for item in self._parse(kind, source, file, declared)]
            held_out = {key(item.prompt): item.split for item in items if item.split != "train"}
            self._items[kind] = [
                item for item in items if held_out.get(key(item.prompt), item.split) == item.split
            ]
        return self._items[kind]

    def _parse(self, kind: str, source: SourceConfig, file: FileRows, declared: set[str]) -> list[Item]:
        items, bad, equal, screened = [], [*file.bad], [], []
        for row in file.rows:
            try:
                item = parse_item(kind, source, row, self.config.substitutions, declared)
            except DataError as error:
                bad.append(BadRow(row.path, row.number, str(error), str(row.values)[:SHOWN]))
                continue
            if "chosen" in item.texts and item.texts["chosen"] == item.texts["rejected"]:
                reason = f"{row.where}: {EQUAL}"
                equal.append(BadRow(row.path, row.number, reason, str(row.values)[:SHOWN]))
                continue
            kept, why = screened_item(item, self.screening)
            if kept is None:
                screened.append(BadRow(row.path, row.number, f"{row.where}: {why}", str(row.values)[:SHOWN]))
            else:
                items.append(kept)
        total = len(file.rows) + len(file.bad)
        if bad:
            self._check_bad(sorted(bad, key=lambda row: row.number), total, source.path)
        self._set_aside(sorted(bad, key=lambda row: row.number), total, source.path)
        self._set_aside(equal, total, source.path)
        self._set_aside(screened, total, source.path)
        return without_repeated_questions(items)

    def _check_bad(self, bad: Sequence[BadRow], total: int, path: str) -> None:
        """Raises DataError with data.bad_rows=refuse, and where there are more than data.max_bad_rows of
        the `total` rows of `path`."""
        first, config = bad[0], self.config
        if config.bad_rows == "refuse":
            raise DataError(first.reason)
        if len(bad) > config.max_bad_rows * total:
            counted = f"{len(bad):,} of {total:,} rows of {path}"
            limit = f"data.max_bad_rows={config.max_bad_rows:g}"
            raise DataError(f"{counted} cannot be used, more than {limit}; the first: {first.reason}")

    def _set_aside(self, rows: Sequence[BadRow], total: int, source: str) -> None:
        """Leave out rows of one source of `total` rows, write them down and say so."""
        if not rows:
            return
        counted = f"{len(rows):,} of {total:,} rows of {source}"
        self.set_aside += rows
        place = ""
        if self._folder:
            lines = [
                {"file": str(row.path), "line": row.number, "reason": row.reason, "text": row.text}
                for row in self.set_aside
            ]
            path = self._folder / SET_ASIDE
            temporary = path.with_name(f".{path.name}.{os.getpid()}")  # every rank writes the same file
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(path)
            place = f" (all in {path})"
        if self._report:
            self._report(f"{counted} set aside{place}; the first: {rows[0].reason}")

    def _split(self, kind: str, split: str) -> list[Item]:
        return [item for item in self.items(kind) if item.split == split]

    def prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """Up to n distinct problems. Raises DataError where the train split has none."""
        asked = [item for item in self._split("reasoning", split) if item.asked]
        items = _sample(_distinct(asked), n, seed, f"prompts/{split}")
        if split == "train" and n and not items:
            raise DataError(f"data={self.config.name} has no problems to train on; try data=gsm8k")
        return [item.prompt for item in items]

    def rows(self, split: str) -> list[Demonstration]:
        return [
            _demonstration(item, item.texts.get("solution", "")) for item in self._split("reasoning", split)
        ]

    def demonstrations(
        self, n: int, seed: int, styles: dict[str, float], correct_only: bool
    ) -> list[Demonstration]:
        """Up to n worked solutions; all count as correct, and `styles` are the shares of tasks. Raises
        DataError where a task has none."""
        solved = [item for item in self._split("reasoning", "train") if item.texts.get("solution")]
        if n and not solved:
            raise DataError(f"data={self.config.name} has no worked solutions; try data=gsm8k")
        tasks = sorted({item.prompt.task for item in solved})
        for task in styles:
            if task not in tasks:
                raise DataError(f"stage.styles.{task} has no worked solutions here; {nearest(task, tasks)}")
        demonstrations = []
        for item in _sample_by_task(solved, n, seed, styles, "traces"):
            summary = summary_of_answer(item.prompt)
            response = compose_response(item.texts["solution"], summary)
            demonstrations.append(_demonstration(item, response))
        return demonstrations

    def general_prompts(self, split: str, n: int, seed: int, kinds: Mapping[str, float]) -> list[Prompt]:
        items = _distinct(self._split("general", split) + self._split("preferences", split))
        return [item.prompt for item in _sample_by_task(items, n, seed, kinds, f"general/{split}")]

    def general_demonstrations(self, n: int, seed: int, kinds: Mapping[str, float]) -> list[Demonstration]:
        answered = [item for item in self._split("general", "train") if item.texts["response"]]
        items = _sample_by_task(answered, n, seed, kinds, "general traces")
        return [_demonstration(item, item.texts["response"]) for item in items]

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


def _sources(config: DataConfig) -> Iterator[tuple[str, SourceConfig, str]]:
    """Kind, source with its full path, and place in the config of each source that has a path."""
    for kind, paths in data_files.located(asdict(config)).items():
        sources: Sequence[SourceConfig] = getattr(config, kind)
        for i, (source, path) in enumerate(zip(sources, paths, strict=False)):
            licence = source.licence or config.licence
            yield kind, replace(source, path=str(path), licence=licence), f"data.{kind}[{i}]"


def _demonstration(item: Item, response: str) -> Demonstration:
    return Demonstration(item.prompt, response, source=item.source, licence=item.prompt.licence)


def _is_mapped(source: SourceConfig) -> bool:
    """Whether its columns are named one by one."""
    return bool(source.columns) and source.layout is None


def _check_source(source: SourceConfig, kind: str, where: str) -> None:
    required, optional = roles(kind, source)
    for role in source.columns:
        if role not in required + optional:
            raise ConfigError(f"{where}.columns.{role} is not a role; {nearest(role, required + optional)}")
    for role in required:
        if role not in source.columns:
            raise ConfigError(f"{where}.columns.{role} is missing; name the column that holds the {role}")
    if source.answer_form not in (None, *Form):
        remedy = nearest(str(source.answer_form), Form)
        raise ConfigError(f"{where}.answer_form={source.answer_form} is unknown; {remedy}")
    if source.split not in (None, *SPLITS):
        raise ConfigError(f"{where}.split={source.split} is not a split; {nearest(source.split, SPLITS)}")
    if source.language not in ("auto", *LANGUAGES):
        remedy = nearest(source.language, ("auto", *LANGUAGES))
        raise ConfigError(f"{where}.language={source.language} is unknown; {remedy}")
    if (source.task in GENERAL_TASKS) == (kind == "reasoning"):
        must = "may not" if kind == "reasoning" else "must"
        raise ConfigError(f"{where}.task={source.task}: it {must} be one of {', '.join(GENERAL_TASKS)}")


def _distinct(items: list[Item]) -> list[Item]:
    return list({key(item.prompt): item for item in reversed(items)}.values())[::-1]


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
