"""New problems that a teacher made up: which are kept, and how they become prompts."""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from r1pipe.core.types import Prompt
from r1pipe.data import overlap
from r1pipe.data.world.content import make_prompt
from r1pipe.rewards.language import language_of
from r1pipe.runs import heartbeat
from r1pipe.train.sft.filters import EXAMPLES, EvalQuestions

FILTERS = ("no problem", "length", "talks about the request", "near copies", "evaluation questions")
TASK = "made_up"  # of such a problem: its final answer is compared as text
# What a model says about the request in place of a problem (Xu et al. 2023, appendix F: "eliminated").
_ABOUT_THE_REQUEST = re.compile(
    r"(given|rewritten|new|created) (problem|prompt)\b|as an ai\b|\bthe (given )?(passage|text)\b|"
    r"i(?:'m| am) sorry",
    re.IGNORECASE,
)


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of two lists of words (Lin 2004), in 0..1."""
    total = len(one) + len(other)
    return 2 * common_subsequence(one, other) / total if total else 1.0


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, with one bit per word of `one` in Python's long integers (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    row = whole = (1 << len(one)) - 1
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & whole
    return len(one) - row.bit_count()


@dataclass
class Funnel:
    """How many problems each filter dropped, with examples, in the form of funnel.json."""

    names: Sequence[str]
    made: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def count(self, dropped_by: str | None, text: str) -> None:
        self.made += 1
        if dropped_by is not None:
            self.dropped.setdefault(dropped_by, []).append(text)

    def steps(self, what: str) -> list[dict[str, Any]]:
        kept = self.made
        steps = [{"name": what, "kept": kept, "dropped": 0, "examples": []}]
        for name in self.names:
            texts = self.dropped.get(name, [])
            kept -= len(texts)
            steps.append({"name": name, "kept": kept, "dropped": len(texts), "examples": texts[:EXAMPLES]})
        return steps


class WordIndex:
    """A growing list of texts, by the words in them: which ones share enough words with another text.

    The second place of a word in a text counts as a word of its own, so that words in common are counted as
    often as both texts have them.
    """

    def __init__(self) -> None:
        self.texts: list[list[str]] = []
        self._lengths = array("q")
        self._places: dict[tuple[str, int], array[int]] = defaultdict(lambda: array("q"))  # numbers of texts

    def add(self, items: list[str]) -> None:
        for word in _numbered(items):
            self._places[word].append(len(self.texts))
        self.texts.append(items)
        self._lengths.append(len(items))

    def alike(self, items: Sequence[str], similarity: float) -> list[list[str]]:
        """The texts that have a ROUGE-L of `similarity` with this one, as far as the words in common tell: a
        common subsequence is no longer than those.

        The commonest words are not looked up. Of those that are, a text must share as many as are needed,
        less those left out.
        """
        lengths = np.array(self._lengths)
        needed = similarity * (len(items) + lengths) / 2
        # a text that is alike has at least similarity / (2 - similarity) of these words
        left_out = max(0, int(len(items) * similarity / (2 - similarity)) - 1)
        found = sorted((self._places.get(word, ()) for word in _numbered(items)), key=len)
        looked_up = found[: len(found) - left_out]
        shared = np.zeros(len(lengths), int)
        for places in looked_up:
            shared[np.frombuffer(places, np.int64) if places else []] += 1
        enough = (shared + left_out >= needed) & (np.minimum(len(items), lengths) >= needed)
        return [self.texts[number] for number in np.flatnonzero(enough)]


def _numbered(items: Sequence[str]) -> list[tuple[str, int]]:
    """Each word with how often it came before."""
    seen: Counter[str] = Counter()
    found = []
    for word in items:
        found.append((word, seen[word]))
        seen[word] += 1
    return found


class Problems:
    """A growing list of problems that are different from each other and from an evaluation's questions.

    A near copy has a ROUGE-L of `max_similarity` with another one (Wang et al. 2022: 0.7); at 1 it has the
    same words. Numbers are words: where problems of one template are wanted, 1 tells them apart.
    """

    def __init__(
        self,
        known: Iterable[str],
        eval_questions: Sequence[str],
        ngram_overlap: int,
        max_similarity: float,
        words: tuple[int, int],
    ):
        self.max_similarity, self.shortest, self.longest = max_similarity, *words
        self.evaluation = EvalQuestions(eval_questions, ngram_overlap)
        self.keys: set[tuple[str, ...]] = set()
        self.words = WordIndex()
        for text in known:
            self._remember(overlap.words(text))
        self.prompts: list[Prompt] = []  # new ones that were kept
        self.funnel = Funnel(FILTERS)

    def add(self, text: str, source: str, licence: str | None, like: str | None = None) -> Prompt | None:
        """The problem as a prompt, if no filter drops it. `like`: what it was rewritten from, which it may
        resemble as long as its words differ."""
        heartbeat.tick()
        text = text.strip()
        items = overlap.words(text)
        failed = self._failed_by(text, items, like)
        self.funnel.count(failed, text)
        if failed is not None:
            return None
        self._remember(items)
        prompt = made_up(text, source, licence)
        self.prompts.append(prompt)
        return prompt

    def _failed_by(self, text: str, items: list[str], like: str | None) -> str | None:
        if not items:
            return "no problem"
        if not self.shortest <= len(items) <= self.longest:
            return "length"
        if _ABOUT_THE_REQUEST.search(text):
            return "talks about the request"
        if self._is_near_copy(items, like):
            return "near copies"
        return "evaluation questions" if self.evaluation.has(text) else None

    def _is_near_copy(self, items: list[str], like: str | None) -> bool:
        if tuple(items) in self.keys:
            return True
        if self.max_similarity >= 1:
            return False
        parent = overlap.words(like) if like is not None else None
        return any(
            other != parent and rouge_l(items, other) >= self.max_similarity
            for other in self.words.alike(items, self.max_similarity)
        )

    def _remember(self, items: list[str]) -> None:
        self.keys.add(tuple(items))
        if self.max_similarity < 1:
            self.words.add(items)


def made_up(question: str, source: str, licence: str | None) -> Prompt:
    """A prompt without a gold answer; its language is read from its words."""
    prompt = make_prompt(TASK, language_of(question), question, "")
    return replace(prompt, source=source, licence=licence)
