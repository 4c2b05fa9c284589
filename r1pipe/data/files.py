"""Data from files: problems with gold answers, instructions with responses, preferences.

A file is described by one small YAML in conf/data/. Sample: conf/data/gsm8k.yaml on the row
{"question": "... How many in all?", "answer": "48/2 = <<48/2=24>>24 in May. ...\\n#### 72"} gives
Prompt(task="gsm8k", question="... How many in all?", answer="72") and a worked solution of it.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeVar

from r1pipe.chat.template import compose_response
from r1pipe.config import DataConfig, SourceConfig
from r1pipe.core.errors import ConfigError, DataError, nearest
from r1pipe.core.types import GENERAL_TASKS, Demonstration, PreferencePair, Prompt, SafetyLabel
from r1pipe.data.columns import dialogue, flag, substitute, text
from r1pipe.data.reading import SHOWN, BadRow, Row, read_tolerant
from r1pipe.data.rejected_rows import NOWHERE, RejectedRows
from r1pipe.data.world.content import prompt_id, split_of
from r1pipe.rewards import check_gold, language_share
from r1pipe.rewards.answers import repaired
from r1pipe.runs import data_files as datafiles

T = TypeVar("T")

ROLES = {
    "reasoning": (("question", "answer"), ("solution",)),  # needed, and possible besides
    "general": (("question", "response"), ()),
    "preferences": (("question", "chosen", "rejected"), ()),
    "labels": (("question", "response", "safe"), ()),
}
SPLITS = ("train", "dev", "test")
SAFE, UNSAFE = "safe", "unsafe"
SUMMARY = {"en": "The answer is {}.", "zh": "答案是{}。"}
CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's marks for a calculator, which are no part of the solution


@dataclass(frozen=True)
class Item:
    """One row as it was understood: the prompt, its texts by role, and where it may be used."""

    prompt: Prompt
    texts: dict[str, str]
    split: str
    source: str  # file and row: the provenance of what is made of it


class Files:
    """The source of `data.kind=files`; a file is read when something in it is first asked for."""

    judge = None
    strategy_of = None

    def __init__(self, config: DataConfig, aside: RejectedRows = NOWHERE):
        """`aside` is where rows go that cannot be used, with data.bad_rows=set_aside."""
        self.config, self._aside = config, aside
        self._sources = _located(config)
        self._items: dict[str, list[Item]] = {}  # kind -> its rows, once something asked for them
        if not any(self._sources.values()):
            raise ConfigError(f"data={config.name} names no file; set data.path=FILE")
        self.hash, self.files = datafiles.hashes(asdict(config))

    def items(self, kind: str) -> list[Item]:
        """All rows of one kind; what a source declares held out is taken out of every other source."""
        if kind not in self._items:
            self._items[kind] = self._read(kind)
        return self._items[kind]

    def _read(self, kind: str) -> list[Item]:
        sources = self._sources[kind]
        declared = {source.split for source in sources if source.split}
        items = []
        for source in sources:
            sifted = read_tolerant(Path(source.path), self.config.longest_row)
            bad, unread = [*sifted.bad], len(sifted.bad)
            for row in sifted.rows:
                try:
                    texts = READERS[kind](row, source)
                    for role in texts:
                        texts[role] = substitute(texts[role], self.config.substitutions, row)
                    items.append(_item(kind, source, row, texts, declared))
                except DataError as error:
                    bad.append(BadRow(row.path, row.number, str(error), str(row.values)[:SHOWN]))
            if bad:
                rows = len(sifted.rows) + unread
                self._aside.take(sorted(bad, key=lambda one: one.number), rows, self.config)
        held_out = {_key(item.prompt): item.split for item in items if item.split != "train"}
        return [item for item in items if held_out.get(_key(item.prompt), item.split) == item.split]

    def prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """Up to n distinct problems. Raises DataError where none may be trained on."""
        found = _drawn(_distinct(self._of("reasoning", split)), n, seed, f"prompts/{split}")
        if split == "train" and n and not found:
            raise DataError(f"data={self.config.name} has no problems to train on; try data=gsm8k")
        return [item.prompt for item in found]

    def rows(self, split: str) -> list[Demonstration]:
        found = self._of("reasoning", split)
        return [
            Demonstration(item.prompt, item.texts.get("solution", ""), source=item.source) for item in found
        ]

    def demonstrations(
        self, n: int, seed: int, styles: dict[str, float], correct_only: bool
    ) -> list[Demonstration]:
        """Up to n worked solutions; a file's are all taken for correct, and none has a known strategy."""
        solved = [item for item in self._of("reasoning", "train") if item.texts.get("solution")]
        if n and not solved:
            raise DataError(f"data={self.config.name} has no worked solutions; try data=gsm8k")
        return [_worked(item) for item in _drawn(solved, n, seed, "traces")]

    def general_prompts(self, split: str, n: int, seed: int, kinds: Mapping[str, float]) -> list[Prompt]:
        """Up to n questions; `kinds` shares them out over the tasks that the files have."""
        found = _distinct(self._of("general", split) + self._of("preferences", split))
        return [item.prompt for item in _shared_out(found, n, seed, kinds, f"general/{split}")]

    def general_demonstrations(self, n: int, seed: int, kinds: Mapping[str, float]) -> list[Demonstration]:
        """Up to n written answers; `kinds` shares them out over the tasks that the files have."""
        items = _shared_out(self._of("general", "train"), n, seed, kinds, "general traces")
        return [Demonstration(item.prompt, item.texts["response"], source=item.source) for item in items]

    def preference_pairs(self, split: str, n: int, seed: int) -> list[PreferencePair]:
        items = _drawn(self._of("preferences", split), n, seed, f"pairs/{split}")
        return [PreferencePair(item.prompt, item.texts["chosen"], item.texts["rejected"]) for item in items]

    def safety_labels(self, split: str, n: int, seed: int) -> list[SafetyLabel]:
        """Of a pair, the chosen answer counts as safe and the rejected one as not."""
        found = [label for item in self._of("labels", split) for label in _labelled(item)]
        return _drawn(found, n, seed, f"labels/{split}")

    def documents(self, seed: int) -> NoReturn:
        raise ConfigError(f"data={self.config.name} has no documents to pre-train on; use data=world")

    def _of(self, kind: str, split: str) -> list[Item]:
        return [item for item in self.items(kind) if item.split == split]


def _located(config: DataConfig) -> dict[str, list[SourceConfig]]:
    """The sources of each kind with their whole paths, checked; those without a place are left out."""
    found = {}
    for kind, places in datafiles.located(asdict(config)).items():
        sources: Sequence[SourceConfig] = getattr(config, kind)
        found[kind] = [
            replace(source, path=str(place)) for source, place in zip(sources, places, strict=False)
        ]
        for i, source in enumerate(found[kind]):
            _check(source, kind, f"data.{kind}[{i}]")
    return found


def roles(kind: str, source: SourceConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The roles that a source's columns must have, and may have; labels may be given as pairs."""
    return ROLES["preferences" if kind == "labels" and "chosen" in source.columns else kind]


def _check(source: SourceConfig, kind: str, where: str) -> None:
    needed, possible = roles(kind, source)
    for role in source.columns:
        if role not in needed + possible:
            raise ConfigError(f"{where}.columns.{role} is no role; {nearest(role, needed + possible)}")
    for role in needed:
        if role not in source.columns:
            raise ConfigError(f"{where}.columns.{role} is missing; name the column that holds the {role}")
    if source.split not in (None, *SPLITS):
        raise ConfigError(f"{where}.split={source.split} is no split; {nearest(source.split, SPLITS)}")
    if source.language not in ("auto", *SUMMARY):
        raise ConfigError(f"{where}.language={source.language} is unknown; use {', '.join(SUMMARY)} or auto")
    if (source.task in GENERAL_TASKS) == (kind == "reasoning"):
        must = "may not" if kind == "reasoning" else "must"
        raise ConfigError(f"{where}.task={source.task}: it {must} be one of {', '.join(GENERAL_TASKS)}")


def _problem(row: Row, source: SourceConfig) -> dict[str, str]:
    """Question, gold answer and, where the row has one, the worked solution without marks."""
    columns = source.columns
    answer = text(row, columns["answer"])
    gold = repaired(_after(answer, source.answer_after, row))
    texts = {"question": text(row, columns["question"]), "answer": gold}
    if "solution" in columns:
        solution = text(row, columns["solution"])
        if source.answer_after and columns["solution"] == columns["answer"]:
            solution = solution.rpartition(source.answer_after)[0]
        texts["solution"] = CALCULATION.sub("", solution).strip()
    return texts


def _after(answer: str, mark: str | None, row: Row) -> str:
    if mark is None:
        return answer
    if mark not in answer:
        raise DataError(f"{row.where}: no {mark!r} stands before the final answer; correct or remove it")
    return answer.rpartition(mark)[2].strip()


def _instruction(row: Row, source: SourceConfig) -> dict[str, str]:
    return {role: text(row, column) for role, column in source.columns.items()}


def _preference(row: Row, source: SourceConfig) -> dict[str, str]:
    return {role: dialogue(row, column) for role, column in source.columns.items()}


def _label(row: Row, source: SourceConfig) -> dict[str, str]:
    if "chosen" in source.columns:
        return _preference(row, source)
    texts = {role: dialogue(row, source.columns[role]) for role in ("question", "response")}
    return texts | {"safe": SAFE if flag(row, source.columns["safe"]) else UNSAFE}


READERS: dict[str, Callable[[Row, SourceConfig], dict[str, str]]] = {
    "reasoning": _problem,
    "general": _instruction,
    "preferences": _preference,
    "labels": _label,
}


def _labelled(item: Item) -> list[SafetyLabel]:
    """The labels in one row: a response's own, or the two of a pair."""
    texts = item.texts
    if "chosen" not in texts:
        return [SafetyLabel(item.prompt, texts["response"], texts["safe"] == SAFE)]
    return [SafetyLabel(item.prompt, texts[role], role == "chosen") for role in ("chosen", "rejected")]


def _item(kind: str, source: SourceConfig, row: Row, texts: dict[str, str], held: set[str]) -> Item:
    for role in roles(kind, source)[0]:
        if not texts[role]:
            column = source.columns[role]
            raise DataError(f"{row.where}: the {role} (column {column}) is empty; fill it in or remove it")
    question, language, task = texts["question"], source.language, source.task
    if language == "auto":
        language = "en" if language_share(question, "en") >= 0.5 else "zh"
    prompt = Prompt(prompt_id(task, language, question), task, language, question, texts.get("answer", ""))
    if kind == "reasoning":
        try:
            check_gold(prompt)
        except DataError as error:
            raise DataError(f"{row.where}: {str(error).removeprefix(f'{prompt.id}: ')}") from None
    split = source.split or split_of(_key(prompt))
    # rows without a split of their own leave to a declared file what it declares
    split = "train" if source.split is None and split in held else split
    return Item(prompt, texts, split, f"{Path(source.path).name}:{row.number}")


def _key(prompt: Prompt) -> str:
    """What makes a question the same question: its words, whatever the spaces and capitals."""
    return " ".join(prompt.question.lower().split())


def _distinct(items: list[Item]) -> list[Item]:
    return list({_key(item.prompt): item for item in reversed(items)}.values())[::-1]


def _shared_out(found: list[Item], n: int, seed: int, kinds: Mapping[str, float], stream: str) -> list[Item]:
    """Up to n of the items, the tasks that they have in the shares of `kinds` (none: as they come)."""
    shares = {task: kinds[task] for task in kinds if any(item.prompt.task == task for item in found)}
    if shares:
        chosen = []
        for task, share in shares.items():
            of_task = [item for item in found if item.prompt.task == task]
            wanted = math.ceil(n * share / sum(shares.values()))
            chosen += _drawn(of_task, wanted, seed, f"{stream}/{task}")
        found = chosen
    return _drawn(found, n, seed, stream)


def _drawn(items: list[T], n: int, seed: int, stream: str) -> list[T]:
    return random.Random(f"{seed}/{stream}").sample(items, min(n, len(items)))


def _worked(item: Item) -> Demonstration:
    summary = SUMMARY[item.prompt.language].format(item.prompt.answer)
    return Demonstration(item.prompt, compose_response(item.texts["solution"], summary), source=item.source)
