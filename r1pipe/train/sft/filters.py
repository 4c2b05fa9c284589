"""Rejection sampling's filters, in order, with a funnel of what each dropped (R1 section 2.3.3).

R1 keeps correct answers and drops "chain-of-thought with mixed languages, long paragraphs, and code blocks";
repetition, duplicates and overlap with evaluation questions are the cold start's and the supplement's. The
thresholds, which were not published, are in conf/.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from r1pipe.chat.template import parse
from r1pipe.config import FilterConfig
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.data import overlap
from r1pipe.rewards import language_share
from r1pipe.runs import heartbeat

FILTERS = (
    "correct",
    "well formed",
    "one language",
    "paragraph length",
    "code blocks",
    "repetition",
    "duplicates",
    "overlap with evaluation",
    "cap per prompt",
)
EXAMPLES = 3  # dropped texts that the funnel shows per filter
REPEATED_GRAM = 4  # n of the n-grams that measure repetition

# A word is a Chinese character, a run of letters or digits, or any other sign.
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")


@dataclass(frozen=True)
class Sampled:
    """A completion on its way to becoming training data."""

    prompt: Prompt
    completion: Completion
    scores: dict[str, Score]


def apply_filters(
    rows: Iterable[Sampled], config: FilterConfig, eval_questions: Sequence[str]
) -> tuple[list[Sampled], list[dict[str, Any]]]:
    """The rows that every filter keeps, in order, and the funnel: {name, kept, dropped, examples} per filter,
    where a row counts for the first one that drops it."""
    failed_filter = _Filters(config, eval_questions).failed_by
    kept: list[Sampled] = []
    dropped: dict[str, list[str]] = {name: [] for name in FILTERS}
    for row in rows:
        heartbeat.tick()
        name = failed_filter(row)
        if name is None:
            kept.append(row)
        else:
            dropped[name].append(row.completion.text)
    remaining = len(kept) + sum(map(len, dropped.values()))
    funnel = []
    for name, texts in dropped.items():
        remaining -= len(texts)
        funnel.append({"name": name, "kept": remaining, "dropped": len(texts), "examples": texts[:EXAMPLES]})
    return kept, funnel


class _Filters:
    """The filters with what they remember of the rows before."""

    def __init__(self, config: FilterConfig, eval_questions: Sequence[str]):
        n = config.ngram_overlap
        self.config = config
        self.eval_keys = {overlap.key(question) for question in eval_questions}
        self.eval_grams = distinctive_grams(eval_questions, n) if n else set()
        self.short_questions = overlap.ShortQuestions(eval_questions, n)
        self.seen: set[tuple[str, str]] = set()
        self.per_prompt: Counter[str] = Counter()

    def failed_by(self, row: Sampled) -> str | None:
        """The name of the first filter that drops a row; None if all keep it."""
        config, prompt, parsed = self.config, row.prompt, parse(row.completion.text)
        accuracy, reasoning = row.scores["accuracy"], parsed.reasoning
        if accuracy.status is not Status.SCORED or accuracy.value != 1.0:  # a failed verifier is no pass
            return "correct"
        full_reward = "format" not in row.scores or row.scores["format"].value == 1.0
        if not (full_reward and parsed.well_formed) or row.completion.truncated:
            return "well formed"
        shares = [language_share(text, prompt.language) for text in (reasoning, parsed.summary)]
        if min(shares) < config.min_language_consistency:
            return "one language"
        # a sampled paragraph has no line breaks
        if any(len(words(line)) > config.max_paragraph for line in reasoning.splitlines()):
            return "paragraph length"
        if "```" in reasoning and not config.allow_code_blocks:  # the summary may hold a program
            return "code blocks"
        if repetition(reasoning) > config.max_repetition:
            return "repetition"
        key = (prompt.id, _key(reasoning))
        if key in self.seen:
            return "duplicates"
        self.seen.add(key)
        if config.ngram_overlap and self.is_copy(overlap.asked(prompt)):
            return "overlap with evaluation"
        self.per_prompt[prompt.id] += 1
        return "cap per prompt" if self.per_prompt[prompt.id] > config.per_prompt else None

    def is_copy(self, question: str) -> bool:
        """Whether it is an evaluation question, shares an n-gram with one, or nearly is a short one."""
        return (
            overlap.key(question) in self.eval_keys
            or not self.eval_grams.isdisjoint(_grams(question, self.config.ngram_overlap))
            or bool(self.short_questions.copied_by(question))
        )


def words(text: str) -> list[str]:
    """Lower-case words; each Chinese character, number and sign is one."""
    return _WORD.findall(text.lower())


def repetition(text: str) -> float:
    """Share of the text's 4-grams that occurred in it before: 0 for none, near 1 for a loop."""
    items = words(text)
    count = len(items) - REPEATED_GRAM + 1
    return 1 - len(overlap.ngrams(items, REPEATED_GRAM)) / count if count > 0 else 0.0


def distinctive_grams(questions: Iterable[str], n: int) -> set[tuple[str, ...]]:
    """N-grams that occur in exactly one of the questions: one that several share is common phrasing ("how
    many does he have left"), no sign of overlap."""
    distinct = {overlap.key(question): question for question in questions}
    counts = Counter(gram for question in distinct.values() for gram in _grams(question, n))
    return {gram for gram, count in counts.items() if count == 1}


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    """Of the words that are compared, and of all as they are written, where signs count towards n."""
    return overlap.ngrams(overlap.words(text), n) | overlap.ngrams(words(text), n)


def _key(text: str) -> str:
    return " ".join(words(text))
