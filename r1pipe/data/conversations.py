"""Conversations in rows: messages ({role, content}), ShareGPT's ({from, value}), and marked-up texts.

A conversation is what was said before, the last question, and the answer to it:
[system, user, assistant, user, assistant] -> context of three turns, question, answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1pipe.core.errors import DataError
from r1pipe.core.types import Message
from r1pipe.data.columns import is_one, text, value
from r1pipe.data.reading import Row
from r1pipe.rewards.programs.cases import loaded

ROLES = {  # of messages and of ShareGPT -> ours
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_SPEAKERS = {"user": "User", "assistant": "Assistant"}
_SHAPES = (("from", "value"), ("role", "content"))
_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # Anthropic's HH


@dataclass(frozen=True)
class Question:
    """What is asked, and what was said before it."""

    text: str
    context: tuple[Message, ...] = ()


def is_conversation(content: Any) -> bool:
    """Whether a column's content is turns, as a list or as JSON in a text."""
    content = _loaded(content)
    return isinstance(content, list) and bool(content) and all(_keys(turn) is not None for turn in content)


def _loaded(content: Any) -> Any:
    """A list of turns that a table holds as JSON."""
    if isinstance(content, str) and content.lstrip().startswith("[{"):
        return loaded(content)
    return content


def _keys(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, dict):
        return None
    return next((keys for keys in _SHAPES if isinstance(turn.get(keys[0]), str) and keys[1] in turn), None)


def turns(row: Row, column: str) -> list[Message]:
    """The turns that a column holds. Raises DataError where it holds something else."""
    content = _loaded(value(row, column))
    return [_turn(turn, column, row) for turn in (content if isinstance(content, list) else [content])]


def _turn(turn: Any, column: str, row: Row) -> Message:
    keys = _keys(turn)
    if keys is None:
        raise DataError(
            f"{row.where}: column {column} is neither text nor turns {{from, value}} or {{role, content}}; "
            "name another column"
        )
    role, content = turn[keys[0]], turn[keys[1]]
    if role.lower() not in ROLES:
        raise DataError(f"{row.where}: column {column} has a turn of {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise DataError(f"{row.where}: column {column} has a turn that is not text; leave the row out")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content or "", str):
        raise DataError(f"{row.where}: column {column} has a turn that is not text; leave the row out")
    return Message(ROLES[role.lower()], (content or "").strip())  # a call of a tool has no content


def dialogue(row: Row, column: str) -> str:
    """A text, a turn or several turns as one text; a single turn gives its text."""
    content = value(row, column)
    if isinstance(content, str):
        return content.strip()
    found = turns(row, column)
    if len(found) == 1:
        return found[0].content
    lines = [(_SPEAKERS.get(turn.role), turn.content) for turn in found]
    return "\n\n".join(f"{who}: {said}" if who else said for who, said in lines)


def split_turns(found: Sequence[Message], where: str) -> tuple[Question, str]:
    """A conversation's last question and the answer to it; "" where none is given. Raises DataError."""
    last = max((i for i, turn in enumerate(found) if turn.role == "assistant"), default=None)
    answer = ""
    if last is not None and last == len(found) - 1:
        answer, found = found[last].content, found[:last]
    if not found or found[-1].role != "user":
        follows = f"its last answer follows a {found[-1].role} turn" if found else "it has no user turn"
        raise DataError(f"{where}: {follows}, and only answers to a user can be learned; leave the row out")
    if any(turn.role == "tool" for turn in found):
        raise DataError(f"{where}: it has a tool turn, which no prompt can hold; leave the row out")
    return Question(found[-1].content, tuple(found[:-1])), answer


def question(row: Row, columns: dict[str, str]) -> Question:
    """The question of the roles `question`, `history` and `system`: text, or a conversation that asks."""
    column = columns["question"]
    if is_one(column) and isinstance(_loaded(value(row, column)), list | dict):
        asked, answer = split_turns(turns(row, column), row.where)
        if answer:
            raise DataError(
                f"{row.where}: column {column} ends with an answer; name the column of the question, or read "
                "the file as instructions (data.general)"
            )
    else:
        asked = Question(text(row, column))
    return after_system(row, columns, Question(asked.text, (*_history(row, columns), *asked.context)))


def conversation(row: Row, columns: dict[str, str]) -> tuple[Question, str]:
    """The question and answer of the roles `conversation` and `system`."""
    asked, answer = split_turns(turns(row, columns["conversation"]), row.where)
    return after_system(row, columns, asked), answer


def after_system(row: Row, columns: dict[str, str], asked: Question) -> Question:
    """The question with the system prompt of the role `system`, where its conversation has none."""
    content = text(row, columns["system"]) if "system" in columns else ""
    if not content or any(turn.role == "system" for turn in asked.context):
        return asked
    return Question(asked.text, (Message("system", content), *asked.context))


def _history(row: Row, columns: dict[str, str]) -> list[Message]:
    """Alpaca's earlier turns: pairs of instruction and response."""
    pairs = (value(row, columns["history"]) or []) if "history" in columns else []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{row.where}: column {columns['history']} is no list of pairs; correct it")
    roles = ("user", "assistant")
    return [
        Message(role, str(said).strip()) for pair in pairs for role, said in zip(roles, pair, strict=True)
    ]


def pair(row: Row, columns: dict[str, str], joined: bool) -> tuple[Question, str, str]:
    """Question, chosen and rejected answer. `joined`: a question of several turns becomes one text.

    Raises DataError.
    """
    chosen, rejected = (_answer_turns(row, columns[role]) for role in ("chosen", "rejected"))
    if len(chosen) > 1 or len(rejected) > 1:
        if chosen[:-1] != rejected[:-1]:
            raise DataError(f"{row.where}: chosen and rejected answer different prompts; leave the row out")
        if (chosen[-1].role, rejected[-1].role) != ("assistant", "assistant"):
            raise DataError(f"{row.where}: chosen or rejected ends without an answer; leave the row out")
    answers = chosen[-1].content, rejected[-1].content
    if "question" not in columns and len(chosen) == 1:
        raise DataError(f"{row.where}: chosen and rejected repeat no prompt; name its column as question")
    if joined and "question" in columns:
        asked = Question(dialogue(row, columns["question"]))
    elif len(chosen) > 1:
        asked = split_turns(chosen, row.where)[0]
    else:
        asked = question(row, columns)
    return after_system(row, columns, asked), *answers


def _answer_turns(row: Row, column: str) -> list[Message]:
    """One answer, or the conversation that it ends."""
    content = value(row, column)
    if isinstance(content, str) and not is_conversation(content):
        parts = _MARK.split(content)
        if parts[0].strip() or len(parts) < 3:
            return [Message("assistant", content.strip())]
        roles = ["user" if who == "Human" else "assistant" for who in parts[1::2]]
        return [Message(role, said.strip()) for role, said in zip(roles, parts[2::2], strict=True)]
    if not content:
        return [Message("assistant", "")]
    return turns(row, column)
