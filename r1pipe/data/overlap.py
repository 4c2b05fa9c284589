"""When two questions are the same: what the filters and the doctor compare evaluation and training data by.

A question counts by its words, whatever the case, the punctuation and the spelling of its LaTeX. Numbers and
operators are words: questions of one template with other numbers are different questions.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from typing import TypeVar

from r1pipe.core.types import Prompt
from r1pipe.rewards.answers.notation import tidy

Ngram = tuple[str, ...]
Places = list[tuple[int, int]]  # (question, first word) of each place where an n-gram occurs
T = TypeVar("T")

SIMILAR = 0.9  # share of words in common, in order, from which on a short question is a copy
SAME_WORD = 0.8  # share of letters in common from which on a word is another spelling
SHORTEST = 4  # words of a question that is looked for inside a longer text
NESTED = 3  # fractions within fractions
OPERATORS = frozenset("+-*/=<>^")

_SPELLINGS = (  # of the same sign
    (re.compile(r"\\(?:cdot|times)(?![a-z])"), "*"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r" \1 / \2 "),
    (re.compile(r"(?<=[a-z])-(?=[a-z]{2})|(?<=[a-z]{2})-(?=[a-z])|(?<=\d)-(?=[a-z]{2})"), " "),  # a hyphen
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
)
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_CHINESE = r"\u3400-\u9fff\uf900-\ufaff"
_END = re.compile(r"[!?:;。！？：；\n]|\.(?!\d)")  # of a sentence, or of what introduces one
_WORD = re.compile(rf"[{_CHINESE}]|\d+(?:\.\d+)?|[^\W\d_{_CHINESE}]+|[-+*/=<>^]")


def words(text: str) -> list[str]:
    """Lower-case words; each Chinese character, number and operator is one. Other signs are left out."""
    text = tidy(text).lower()
    for spelling, meaning in _SPELLINGS:
        text = spelling.sub(meaning, text)
    for _ in range(NESTED):
        text = _FRACTION.sub(r" \1 / \2 ", text)
    found = _WORD.findall(text)
    around = zip(["", *found], found, [*found[1:], ""], strict=False)
    return [word for before, word, after in around if word != "-" or _operand(before) or _operand(after)]


def _operand(word: str) -> bool:
    return word[:1].isdigit() or (len(word) == 1 and word.isascii() and word.isalpha())


def key(text: str) -> str:
    """What two texts share if they are the same."""
    return " ".join(words(text))


def user_text(prompt: Prompt) -> str:
    """All that the user says: the question, after the user's earlier turns."""
    turns = [message.content for message in prompt.context if message.role == "user"]
    return "\n".join([*turns, prompt.question])


def ngrams(items: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(items[i : i + n]) for i in range(len(items) - n + 1)}


class ShortQuestions:
    """Those of the questions that have too few words for an n-gram; their copies are found all the same.

    A copy has the same numbers and operators in the same order. It may have a few words more or fewer, or
    spell one otherwise; another word in its place makes another question ("add them", "count them").
    """

    def __init__(self, questions: Iterable[str], n: int):
        self._by_figures: dict[tuple[str, ...], list[tuple[int, list[str]]]] = defaultdict(list)
        self._by_start: dict[tuple[str, ...], list[tuple[int, list[str]]]] = defaultdict(list)
        for number, question in enumerate(questions):
            if 0 < len(items := words(question)) < n:
                self._by_figures[_figures(items)].append((number, items))
                if len(items) >= SHORTEST:
                    self._by_start[tuple(items[:SHORTEST])].append((number, items))

    def copied_by(self, text: str) -> set[int]:
        """The indices of the questions that a text is, nearly is, or holds as sentences of its own."""
        items = words(text)
        alike = self._by_figures.get(_figures(items), ())
        return {number for number, short in alike if _similar(short, items)} | self._inside(text, items)

    def _inside(self, text: str, items: list[str]) -> set[int]:
        starts = (tuple(items[i : i + SHORTEST]) for i in range(len(items) - SHORTEST + 1))
        candidates = [found for start in starts for found in self._by_start.get(start, ())]
        if not candidates:
            return set()
        sentences = [words(sentence) for sentence in _END.split(text)]
        ends = {0, *accumulate(map(len, sentences))}
        items = [word for sentence in sentences for word in sentence]
        return {
            number
            for number, short in candidates
            if any(
                first + len(short) in ends and items[first : first + len(short)] == short for first in ends
            )
        }


def _similar(one: list[str], other: list[str]) -> bool:
    total, shared = len(one) + len(other), len({*one} & {*other})
    if 2 * min(len(one), len(other)) < SIMILAR * total or 4 * shared < total:  # most questions end here
        return False
    common = 0
    for tag, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if tag == "replace":
            letters = SequenceMatcher(None, "".join(one[a:b]), "".join(other[c:d]), autojunk=False)
            if letters.ratio() < SAME_WORD:
                return False
        if tag in ("equal", "replace"):
            common += b - a + d - c
    return common >= SIMILAR * total


def _figures(items: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for word in items if word[0].isdigit() or word in OPERATORS)


def matches(
    questions: Sequence[str], texts: Iterable[tuple[str, T]], n: int, common: int
) -> Iterator[tuple[int, float, T]]:
    """(question, share of its words, text) wherever a text has words of a question, in n-grams of both.

    Only words in distinctive n-grams count: those that at most `common` questions have. A question without an
    n-gram is found as a whole, as `ShortQuestions` says, with a share of 1.
    """
    places: dict[Ngram, Places] = defaultdict(list)
    for number, question in enumerate(questions):
        items = words(question)
        for first in range(len(items) - n + 1):
            places[tuple(items[first : first + n])].append((number, first))
    distinctive = {gram: where for gram, where in places.items() if len(where) <= common}
    countable = _covered_words(distinctive.values(), n)
    short = ShortQuestions(questions, n)
    for text, item in texts:
        for number in short.copied_by(text):
            yield number, 1.0, item
        shared = distinctive.keys() & ngrams(words(text), n)
        for number, covered in _covered_words((distinctive[gram] for gram in shared), n).items():
            yield number, len(covered) / len(countable[number]), item


def _covered_words(places: Iterable[Places], n: int) -> dict[int, set[int]]:
    """For each question, the indices of the words in its n-grams at these places."""
    covered: dict[int, set[int]] = defaultdict(set)
    for where in places:
        for number, first in where:
            covered[number].update(range(first, first + n))
    return covered
