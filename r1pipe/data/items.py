"""One row of a data file as an item: its prompt, and its texts by role."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from r1pipe.config import SourceConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Prompt
from r1pipe.data import conversations
from r1pipe.data.answers import read_answer, shows_options
from r1pipe.data.columns import flag, substitute, text, value
from r1pipe.data.conversations import Question
from r1pipe.data.formats import HALF
from r1pipe.data.layouts import is_code
from r1pipe.data.reading import Row
from r1pipe.data.world.content import make_prompt, split_of
from r1pipe.rewards import check_gold
from r1pipe.rewards.answers.gold import restore_backslashes, unwrap
from r1pipe.rewards.language import language_of
from r1pipe.rewards.programs import tasks
from r1pipe.rewards.programs.cases import loaded

PAIR = (("chosen", "rejected"), ("question", "system"))
CONVERSATION = (("conversation",), ("system",))
CODE = ((), ("question", "system"))
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # kind -> required roles, optional roles
    "reasoning": (
        ("question", "answer"),
        ("solution", "options", "alternatives", "form", "system", "level", "subject"),
    ),
    "general": (("question", "response"), ("history", "system")),
    "preferences": PAIR,
    "labels": (("question", "response", "safe"), ("system",)),
}
SAFE, UNSAFE = "safe", "unsafe"
CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator annotations, which are not part of the solution
EXPRESSION = re.compile(r"(?=.*\d[\s)]*[-+*/])[\d\s.()+*/-]+")  # numbers and operators, at least one
ZERO = re.compile(r"(?<=\d)\.0+(?![\d.])")


@dataclass(frozen=True)
class Item:
    """One parsed row: the prompt, its texts by role, and its split."""

    prompt: Prompt
    texts: dict[str, str]
    split: str
    asked: bool = True  # whether it is a prompt, too, and no solution alone

    @property
    def source(self) -> str:
        """Provenance: file and row."""
        return self.prompt.source


@dataclass
class Parts:
    """What a row holds before it is a prompt."""

    asked: Question
    texts: dict[str, str]
    checker: dict[str, Any] = field(default_factory=dict)
    is_code: bool = False  # tests stand in place of a gold answer


def roles(kind: str, source: SourceConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A source's required and optional roles; labels may be given as pairs."""
    if kind == "reasoning" and source.layout == "code":
        return CODE
    if kind == "general" and "conversation" in source.columns:
        return CONVERSATION
    return PAIR if kind == "labels" and "chosen" in source.columns else ROLES[kind]


def parse_item(
    kind: str, source: SourceConfig, row: Row, substitutions: dict[str, str], declared: set[str]
) -> Item:
    """The row as an item; `declared` are the splits that whole files claim. Raises DataError."""
    parts = _reasoning(row, source) if kind == "reasoning" else _texts(kind, row, source)
    if kind != "reasoning":  # formulas have double braces of their own
        parts.texts = {role: substitute(parts.texts[role], substitutions, row) for role in parts.texts}
    texts = parts.texts
    for role in ("question", *roles(kind, source)[0]):
        if role != "conversation" and not texts[role] and not (role == "answer" and parts.is_code):
            column = source.columns.get(role, role)
            raise DataError(f"{row.where}: the {role} (column {column}) is empty; fill it in or remove it")
    if HALF.search("".join([*texts.values(), *(turn.content for turn in parts.asked.context)])):
        raise DataError(f"{row.where}: it holds half a character (a lone surrogate); correct it")
    question, language = texts["question"], source.language
    if language == "auto":
        language = language_of(question)
    answer, context = texts.get("answer", ""), parts.asked.context
    prompt = make_prompt(source.task, language, question, answer, parts.checker, context=context)
    prompt = replace(prompt, level=_level(row, source.columns), subject=_subject(row, source.columns))
    if kind == "reasoning":
        try:
            check_gold(prompt)
        except DataError as error:
            raise DataError(f"{row.where}: {str(error).removeprefix(f'{prompt.id}: ')}") from None
    named = source.split or (row.split if row.split != "train" else None)
    split = named or split_of(key(prompt))
    if named is None and split in declared:
        split = "train"  # a file that declares this split provides all of it
    place = f"{row.path.name}:{row.number}"
    return Item(replace(prompt, source=place, licence=source.licence), texts, split, source.prompts)


def _level(row: Row, columns: Mapping[str, str]) -> int:
    """The number in a row's level (5, "Level 5"); 0 where the source names none. Raises DataError."""
    if "level" not in columns:
        return 0
    said = text(row, columns["level"])
    number = re.search(r"\d+", said)
    if number is None:
        raise DataError(f"{row.where}: the level {said[:40]!r} (column {columns['level']}) has no number")
    return int(number[0])


def _subject(row: Row, columns: Mapping[str, str]) -> str:
    return text(row, columns["subject"]) if "subject" in columns else ""


def _texts(kind: str, row: Row, source: SourceConfig) -> Parts:
    """The texts of a row that no rule scores, by role."""
    columns = source.columns
    joined = source.layout is None  # columns named one by one: a question of several turns is one text
    if "chosen" in columns:
        asked, chosen, rejected = conversations.pair(row, columns, joined)
        return Parts(asked, {"question": asked.text, "chosen": chosen, "rejected": rejected})
    if "conversation" in columns:
        asked, response = conversations.conversation(row, columns)
        return Parts(asked, {"question": asked.text, "response": response})
    if kind == "labels" and joined:
        asked = Question(conversations.dialogue(row, columns["question"]))
        asked = conversations.after_system(row, columns, asked)
    else:
        asked = conversations.question(row, columns)
    response = columns["response"]
    is_turns = conversations.is_conversation(value(row, response)) if response in row.values else False
    said = conversations.turns(row, response)[-1].content if is_turns else None
    if said is None:
        said = conversations.dialogue(row, response) if kind == "labels" else text(row, response)
    texts = {"question": asked.text, "response": said}
    if "safe" in columns:
        texts["safe"] = SAFE if flag(row, columns["safe"]) else UNSAFE
    return Parts(asked, texts)


def _reasoning(row: Row, source: SourceConfig) -> Parts:
    """A problem: the gold answer alone, and the worked solution without annotations."""
    columns, mark = source.columns, source.answer_after
    if (code := _code_of(row, source)) is not None:
        try:
            task = tasks.read_task(code)
            asked = Question("" if "question" in columns else tasks.question_of(code))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
        if "question" in columns:
            asked = conversations.question(row, columns)
        asked = conversations.after_system(row, columns, asked)
        return Parts(asked, {"question": asked.text, "answer": ""}, task, is_code=True)
    found = read_answer(row, columns)
    answer = found.text
    if mark is not None:
        if mark not in answer:
            raise DataError(f"{row.where}: {mark!r} is missing before the final answer; correct or remove it")
        answer = answer.rpartition(mark)[2].strip()
    answer = restore_backslashes(unwrap(answer) if source.layout and "boxed" in answer else answer)
    asked = conversations.question(row, columns)
    question = asked.text
    if question and found.options and not shows_options(question, found.checker):
        question = f"{question}\n{found.options}"
    texts = {"question": question, "answer": answer}
    if "solution" in columns:
        solution = text(row, columns["solution"])
        if mark and columns["solution"] == columns["answer"]:
            solution = solution.rpartition(mark)[0]
        texts["solution"] = worked(solution, answer)
    form = source.answer_form or (text(row, columns["form"]) if "form" in columns else "")
    return Parts(asked, texts, ({"answer_form": form} if form else {}) | found.checker)


def worked(solution: str, answer: str) -> str:
    """A solution as one would write it: no annotations; an expression that stands alone with whole numbers
    and its value, as SVAMP's "( 14.0 + 39.0 )" with 53 -> "14 + 39 = 53"."""
    solution = CALCULATION.sub("", solution).strip()
    if not EXPRESSION.fullmatch(solution):
        return solution
    expression = ZERO.sub("", solution)
    inner = expression[1:-1]
    if expression[0] == "(" and expression[-1] == ")" and _is_balanced(inner):
        expression = inner.strip()
    return f"{expression} = {answer}"


def _is_balanced(text: str) -> bool:
    """Whether every parenthesis in it is closed after it was opened."""
    depths = list(accumulate((sign == "(") - (sign == ")") for sign in text))
    return min(depths, default=0) >= 0 and not (depths and depths[-1])


def _code_of(row: Row, source: SourceConfig) -> Mapping[str, Any] | None:
    """The columns of a code task, where the row is one."""
    if source.layout == "code":
        return row.values
    truth = {"ground_truth": loaded(value(row, source.columns["answer"]))} if source.layout == "verl" else {}
    return truth if truth and is_code(truth) else None


def without_repeated_questions(items: list[Item]) -> list[Item]:
    """The pairs of a file, whose answers lose the question before them where most pairs repeat it: in one
    pair alone, both answers may begin with it by chance ("Hello").
    """
    repeating = [each for each in items if "chosen" in each.texts and _repeats_question(each)]
    if 2 * len(repeating) <= len(items):
        return items
    return [_without_question(each) if _repeats_question(each) else each for each in items]


def _repeats_question(item: Item) -> bool:
    question, answers = item.prompt.question, [item.texts[role] for role in PAIR[0]]
    return all(answer.startswith(question) and answer != question for answer in answers)


def _without_question(item: Item) -> Item:
    answers = {role: item.texts[role].removeprefix(item.prompt.question).strip() for role in PAIR[0]}
    return replace(item, texts=item.texts | answers)


def key(prompt: Prompt) -> str:
    """What makes two questions the same: their words, whatever the spaces and capitals."""
    turns = [f"{turn.role}: {turn.content}" for turn in prompt.context]
    return " ".join("\n".join([*turns, prompt.question]).lower().split())
