"""The bundled world's words, facts and sentences, read from data/world/; and its held-out split.

Pairs in the files are [English, Chinese]; `LANGUAGES.index(language)` picks one.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from r1pipe.core.errors import DataError
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Message, Prompt

T = TypeVar("T")

LANGUAGES = ("en", "zh")
ATTEMPTS = 100_000  # draws before giving up
# Shares of the split, in twentieths of the hash space: 2 test, 1 dev, the rest train.
_SPLIT_OF_BUCKET = ("test", "test", "dev", *["train"] * 17)


@functools.cache
def content(name: str) -> dict:
    """One of words, facts, general, corpus, unseen."""
    return json.loads((content_dir() / "world" / f"{name}.json").read_text(encoding="utf-8"))


def index(language: str) -> int:
    return LANGUAGES.index(language)


def split_of(key: str) -> str:
    """train, dev or test, by the hash of what identifies a problem, so that splits cannot overlap."""
    digest = hashlib.sha256(key.encode()).digest()
    return _SPLIT_OF_BUCKET[int.from_bytes(digest[:4], "big") % len(_SPLIT_OF_BUCKET)]


def make_prompt(
    task: str,
    language: str,
    question: str,
    answer: str,
    checker: dict | None = None,
    level: int = 0,
    context: tuple[Message, ...] = (),
) -> Prompt:
    """A prompt whose id is a hash of its task, language, context and question."""
    before = "".join(f"{turn.role}|{turn.content}|" for turn in context)
    digest = hashlib.sha256(f"{language}|{before}{question}".encode()).hexdigest()
    return Prompt(f"{task}-{digest[:12]}", task, language, question, answer, checker or {}, level, context)


def reworded(prompt: Prompt) -> Prompt:
    """A problem told with the names, things and phrases of unseen.json, which nothing is trained on."""
    question, checker = prompt.question, dict(prompt.checker)
    for pattern, text in content("unseen").get(prompt.language, ()):
        question = re.sub(pattern, text, question)
        checker["names"] = [re.sub(pattern, text, name) for name in checker.get("names", ())]
    return make_prompt(
        prompt.task, prompt.language, question, prompt.answer, checker, prompt.level, prompt.context
    )


def choose(rng: random.Random, weights: Mapping[str, float]) -> str:
    """A key, drawn by weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def draw_until(make: Callable[[], T], fits: Callable[[T], bool], wanted: str) -> T:
    """The first result of `make` that fits. Raises DataError after ATTEMPTS without one."""
    for _ in range(ATTEMPTS):
        candidate = make()
        if fits(candidate):
            return candidate
    raise DataError(f"{ATTEMPTS:,} draws from the bundled world gave 0 of what was wanted: a {wanted}")
