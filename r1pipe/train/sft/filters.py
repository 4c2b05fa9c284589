"""Rejection sampling's filters, in order, with a funnel of what each dropped (R1 section 2.3.3).

R1 keeps correct answers and drops "chain-of-thought with mixed languages, long paragraphs, and code blocks";
repetition, duplicates and overlap with evaluation questions are the cold start's and the supplement's. The
thresholds, which were not published, are in conf/.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1pipe.chat.template import Parsed, parse
from r1pipe.config import FilterConfig
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import language_share
from r1pipe.runs import heartbeat

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


@dataclass
class Context:
    """What the filters use besides the row itself; the last two grow as rows pass."""

    config: FilterConfig
    eval_questions: set[str]
    eval_grams: set[tuple[str, ...]]
    seen: set[tuple[str, str]] = field(default_factory=set)
    per_prompt: Counter[str] = field(default_factory=Counter)


Filter = Callable[[Sampled, Parsed, Context], bool]


def apply_filters(
    rows: Iterable[Sampled], config: FilterConfig, eval_questions: Sequence[str]
) -> tuple[list[Sampled], list[dict[str, Any]]]:
    """The rows that every filter keeps, in order, and the funnel: {name, kept, dropped, examples} per filter.

    Each filter sees what the one before it kept. `eval_questions`: all questions of the evaluations.
    """
    grams = distinctive_grams(eval_questions, config.ngram_overlap) if config.ngram_overlap else set()
    context = Context(config, {_key(question) for question in eval_questions}, grams)
    kept: list[tuple[Sampled, Parsed]] = []
    for row in rows:
        heartbeat.tick()
        kept.append((row, parse(row.completion.text)))
    funnel = []
    for name, keep in FILTERS.items():
        pairs, kept, dropped = kept, [], []
        for row, parsed in pairs:
            heartbeat.tick()
            if keep(row, parsed, context):
                kept.append((row, parsed))
            else:
                dropped.append(row.completion.text)
        funnel.append(
            {"name": name, "kept": len(kept), "dropped": len(dropped), "examples": dropped[:EXAMPLES]}
        )
    return [row for row, _ in kept], funnel


def correct(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """Scored, and right: a failed verifier is not a pass."""
    score = row.scores["accuracy"]
    return score.status is Status.SCORED and score.value == 1.0


def well_formed(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """Full format reward, if scored; reasoning and summary present, and not truncated."""
    full_reward = "format" not in row.scores or row.scores["format"].value == 1.0
    return full_reward and parsed.well_formed and not row.completion.truncated


def one_language(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """Reasoning and summary are each in the language of the prompt."""
    least = context.config.min_language_consistency
    language = row.prompt.language
    return all(language_share(text, language) >= least for text in (parsed.reasoning, parsed.summary))


def short_paragraphs(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """No line of the reasoning is longer than the limit, in words; a sampled paragraph has no line breaks."""
    return all(len(words(line)) <= context.config.max_paragraph for line in parsed.reasoning.splitlines())


def no_code_blocks(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """No code fence in the reasoning, unless allowed; the summary may hold a program."""
    return context.config.allow_code_blocks or "```" not in parsed.reasoning


def not_repetitive(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """The share of repeated 4-grams in the reasoning is within the limit."""
    return repetition(parsed.reasoning) <= context.config.max_repetition


def not_seen(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """The same reasoning for the same prompt, ignoring spaces, is kept once."""
    key = (row.prompt.id, _key(parsed.reasoning))
    fresh = key not in context.seen
    context.seen.add(key)
    return fresh


def not_in_evaluation(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """The prompt is no evaluation question and shares no distinctive n-gram with one."""
    if not context.config.ngram_overlap:
        return True
    if _key(row.prompt.question) in context.eval_questions:
        return False
    return context.eval_grams.isdisjoint(ngrams(words(row.prompt.question), context.config.ngram_overlap))


def within_cap(row: Sampled, parsed: Parsed, context: Context) -> bool:
    """The first `per_prompt` completions of each prompt."""
    context.per_prompt[row.prompt.id] += 1
    return context.per_prompt[row.prompt.id] <= context.config.per_prompt


FILTERS: dict[str, Filter] = {
    "correct": correct,
    "well formed": well_formed,
    "one language": one_language,
    "paragraph length": short_paragraphs,
    "code blocks": no_code_blocks,
    "repetition": not_repetitive,
    "duplicates": not_seen,
    "overlap with evaluation": not_in_evaluation,
    "cap per prompt": within_cap,
}


def words(text: str) -> list[str]:
    """Lower-case words; each Chinese character, number and sign is one."""
    return _WORD.findall(text.lower())


def ngrams(items: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(items[i : i + n]) for i in range(len(items) - n + 1)}


def repetition(text: str) -> float:
    """Share of the text's 4-grams that occurred in it before: 0 for none, near 1 for a loop."""
    items = words(text)
    count = len(items) - REPEATED_GRAM + 1
    return 1 - len(ngrams(items, REPEATED_GRAM)) / count if count > 0 else 0.0


def distinctive_grams(questions: Iterable[str], n: int) -> set[tuple[str, ...]]:
    """N-grams that occur in exactly one of the questions.

    One that several questions share is common phrasing ("how many does he have left"), no sign of overlap.
    """
    distinct = {_key(question): question for question in questions}
    counts = Counter(gram for question in distinct.values() for gram in ngrams(words(question), n))
    return {gram for gram, count in counts.items() if count == 1}


def _key(text: str) -> str:
    return " ".join(words(text))
