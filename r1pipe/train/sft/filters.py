"""Rejection sampling's filters, in order, with a funnel of what each dropped (R1 section 2.3.3).

R1 keeps correct answers and drops "chain-of-thought with mixed languages, long paragraphs, and code blocks";
repetition, duplicates and overlap with evaluation questions are the cold start's and the supplement's. The
thresholds, which were not published, are in conf/.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from r1pipe.chat.template import Parsed, parse
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
    rows: Iterable[Sampled],
    config: FilterConfig,
    eval_questions: Sequence[str],
    left_out: Collection[str] = (),
) -> tuple[list[Sampled], list[dict[str, Any]]]:
    """The rows that every filter keeps, in order, and the funnel: {name, kept, dropped, examples} per filter,
    where a row counts for the first one that drops it. `left_out`: "correct" and "well formed" may be."""
    failed_filter = _Filters(config, eval_questions, left_out).failed_by
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

    def __init__(self, config: FilterConfig, eval_questions: Sequence[str], left_out: Collection[str] = ()):
        self.config, self.left_out = config, left_out
        self.evaluation = EvalQuestions(eval_questions, config.ngram_overlap)
        self.seen: set[tuple[str, str]] = set()
        self.per_prompt: Counter[str] = Counter()

    def failed_by(self, row: Sampled) -> str | None:
        """The name of the first filter that drops a row; None if all keep it."""
        config, prompt, parsed = self.config, row.prompt, parse(row.completion.text)
        if not self._is_correct(row):
            return "correct"
        if not self._is_whole(row, parsed):
            return "well formed"
        # without a thought, where such answers are let through, the rest is what is read
        reasoning, texts = parsed.reasoning or parsed.summary, (parsed.reasoning, parsed.summary)
        shares = [language_share(text, prompt.language) for text in texts if text]
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
        if self.evaluation.has(overlap.user_text(prompt)):
            return "overlap with evaluation"
        self.per_prompt[prompt.id] += 1
        return "cap per prompt" if self.per_prompt[prompt.id] > config.per_prompt else None

    def _is_correct(self, row: Sampled) -> bool:
        """Whether the rules find it right; for a general prompt there is none."""
        accuracy = row.scores.get("accuracy")
        if "correct" in self.left_out or accuracy is None:
            return True
        return accuracy.status is Status.SCORED and accuracy.value == 1.0  # a failed verifier is no pass

    def _is_whole(self, row: Sampled, parsed: Parsed) -> bool:
        """Whether it has ended, and is a thought with a summary."""
        if row.completion.truncated or not parsed.summary:
            return False
        full_reward = "format" not in row.scores or row.scores["format"].value == 1.0
        return "well formed" in self.left_out or (full_reward and parsed.well_formed)


class EvalQuestions:
    """The questions of an evaluation, which are not to be trained on."""

    def __init__(self, questions: Sequence[str], n: int):
        """`n`: of the n-grams that are compared; 0: nothing is."""
        self.n = n
        self.keys = {overlap.key(question) for question in questions}
        self.grams = distinctive_grams(questions, n) if n else set()
        self.short_questions = overlap.ShortQuestions(questions, n)

    def has(self, question: str) -> bool:
        """Whether it is an evaluation question, shares an n-gram with one, or nearly is a short one."""
        return self.n > 0 and (
            overlap.key(question) in self.keys
            or not self.grams.isdisjoint(_grams(question, self.n))
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
