"""What `r1pipe data` shows: rows, gold answers, what is set aside and why, samples as rendered."""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from r1pipe.chat.template import Chat
from r1pipe.config.fields import shown
from r1pipe.core.errors import DataError
from r1pipe.core.types import Prompt
from r1pipe.data.files import Files
from r1pipe.data.items import Item, key
from r1pipe.rewards.accuracy import gold_of
from r1pipe.runs.data_files import KINDS

MEASURED = 1000  # rows whose tokens are counted
SAMPLES = 5
FIRST = 3  # places that a reason is given with
_TESTS = "tests"  # the form of a code task
_VARYING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d[\d,]*")
_ANSWERS = ("response", "chosen", "rejected", "solution")

Summary = dict[str, Any]  # plain JSON


def summarise(data: Files, chat: Chat) -> Summary:
    """All that is shown, as plain JSON. Raises DataError where the template refuses a row's messages."""
    items = {kind: data.items(kind) for kind in KINDS if data.sources[kind]}
    rows = [item for found in items.values() for item in found]
    sources = [
        {"kind": kind, "described": data.described.get(source.path), **asdict(source)}
        for kind, found in data.sources.items()
        for source in found
    ]
    keys = [(key(item.prompt), *sorted(item.texts.items())) for item in rows]
    return {
        "sources": sources,
        "rows": {kind: len(found) for kind, found in items.items()},
        "exact_repeats": len(keys) - len(set(keys)),
        "forms": dict(Counter(_form(item.prompt) for item in items.get("reasoning", [])).most_common()),
        "with_alternatives": sum("alternatives" in item.prompt.checker for item in rows),
        "with_context": sum(bool(item.prompt.context) for item in rows),
        "languages": dict(Counter(item.prompt.language for item in rows).most_common()),
        "splits": dict(Counter(item.split for item in rows).most_common()),
        "set_aside": _reasons(data),
        "screening": data.screening.report() if data.screening else None,
        "tokens": _tokens(rows[:MEASURED], chat),
        "samples": [_sample(kind, item, chat) for kind, item in _spread(items)],
    }


def _form(prompt: Prompt) -> str:
    return str(gold_of(prompt).form) if prompt.answer else _TESTS


def _reasons(data: Files) -> list[Summary]:
    """The rows set aside, those of one reason together, the most frequent reason first."""
    groups = defaultdict(list)
    for row in data.set_aside:
        reason = row.reason.removeprefix(str(row.path)).lstrip()
        reason = re.sub(r"^(?:\w+ )*?(?:line|row) \d+:? ?", "", reason)
        groups[_VARYING.sub("…", reason)].append((reason, row))
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [
        {
            "rows": len(group),
            "reason": group[0][0],
            "lines": [row.number for _, row in group[:FIRST]],
            "file": str(group[0][1].path),
        }
        for group in ordered
    ]


def _tokens(items: Sequence[Item], chat: Chat) -> Summary:
    """Tokens of the first prompts and answers: median, 95th percentile and most."""
    prompts = [len(_prompt_tokens(item, chat)) for item in items]
    answers = [len(chat.encode(text)) for item in items for text in _answers(item)]
    return {"prompts": _distribution(prompts), "answers": _distribution(answers)}


def _prompt_tokens(item: Item, chat: Chat) -> list[int]:
    """Raises DataError, naming the row, where the template cannot show its messages."""
    try:
        return chat.prompt_tokens(item.prompt)
    except DataError as error:
        raise DataError(f"{item.source}: {error}") from None


def _answers(item: Item) -> list[str]:
    return [item.texts[role] for role in _ANSWERS if item.texts.get(role)]


def _distribution(lengths: list[int]) -> Summary | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    p95 = ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    return {"rows": len(lengths), "median": statistics.median_low(ordered), "p95": p95, "most": ordered[-1]}


def _spread(items: dict[str, list[Item]]) -> Iterable[tuple[str, Item]]:
    """Items of all kinds, as evenly as there are, from the beginning to the end of each."""
    share = max(1, SAMPLES // max(1, len(items)))
    chosen = [
        [(kind, found[i * len(found) // share]) for i in range(min(share, len(found)))]
        for kind, found in items.items()
    ]
    return list(chain.from_iterable(chosen))[:SAMPLES]


def _sample(kind: str, item: Item, chat: Chat) -> Summary:
    """A row as it is rendered, and what is compared with or learned."""
    prompt = item.prompt
    sample = {"place": item.source, "kind": kind, "split": item.split, "language": prompt.language}
    rendered = chat.tokenizer.decode(_prompt_tokens(item, chat), skip_special_tokens=False)
    gold = {"answer": prompt.answer, "form": _form(prompt)} if kind == "reasoning" else {}
    checker = {name: shown(value) for name, value in prompt.checker.items()}
    return {**sample, "prompt": rendered, **gold, "checker": checker, **_texts(item)}


def _texts(item: Item) -> dict[str, str]:
    return {role: text for role, text in item.texts.items() if role not in ("question", "answer") and text}
