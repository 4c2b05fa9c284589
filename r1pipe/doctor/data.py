"""The data: whether it can be read, its gold answers, what stands in it twice, what the evaluation shares."""

from collections import Counter

from r1pipe.config.schema import EvaluateConfig
from r1pipe.data.filters import ngrams, words
from r1pipe.doctor.context import Context, graded
from r1pipe.errors import DataError
from r1pipe.findings import FAIL, PASS, WARN, Finding
from r1pipe.rewards import check_gold


def readable(context: Context, name: str) -> Finding:
    """Files, columns and rows: whatever is wrong with them raises DataError, with file and line."""
    learned = [] if isinstance(context.config.stage, EvaluateConfig) else context.prompts
    traces, held_out = context.traces, context.held_out
    what = context.config.data.name
    shown = f"data={what}: {len(traces) or len(learned):,} rows to train on looked at"
    shown += f", {len(held_out):,} to evaluate on"
    if not held_out:
        split = context.config.stage.eval.split
        return Finding(name, WARN, shown, f"add rows of split {split}, or nothing will be measured")
    return Finding(name, PASS, shown)


def gold_answers(context: Context, name: str) -> Finding:
    """Whether any answer could ever match each gold answer."""
    learned = [] if isinstance(context.config.stage, EvaluateConfig) else context.prompts
    looked_at = [*learned, *context.held_out]
    wrong = []
    for prompt in looked_at:
        try:
            check_gold(prompt)
        except DataError as error:
            wrong.append(str(error))
    shown = f"{len(looked_at) - len(wrong):,} of {len(looked_at):,} parse"
    return Finding(name, FAIL, shown, wrong[0]) if wrong else Finding(name, PASS, shown)


def duplicates(context: Context, name: str) -> Finding:
    """Rows whose words, whatever the signs between them, stood in an earlier row."""
    if context.traces:
        keys = [_key(trace.prompt.question, trace.response) for trace in context.traces]
    else:
        keys = [_key(prompt.question) for prompt in context.prompts]
    twice = sum(count - 1 for count in Counter(keys).values())
    share = twice / max(1, len(keys))
    return graded(
        name,
        share,
        context.limits.duplicates,
        f"{twice:,} of {len(keys):,} rows ({share:.1%})",
        "leave one of each in the data: what stands there twice is learned twice",
    )


def overlap(context: Context, name: str) -> Finding:
    """Evaluation questions that training ones repeat, whole or in most of their n-grams: templates share a
    sentence or two, a copied question nearly all."""
    learned = [trace.prompt for trace in context.traces] or context.prompts
    questions = {_key(prompt.question): prompt.question for prompt in context.held_out}
    seen = {_key(prompt.question) for prompt in learned}
    n, limits = context.limits.ngram, context.limits
    grams = {gram for prompt in learned for gram in ngrams(words(prompt.question), n)}
    whole = {key for key in questions if key in seen}
    partly = {key for key, text in questions.items() if _covered(text, grams, n) >= limits.covered} - whole
    share = len(partly) / max(1, len(questions))
    shown = f"{len(whole)} of {len(questions):,} evaluation questions are trained on, {len(partly)} more in "
    shown += f"{limits.covered:.0%} of their {n}-grams"
    remedy = "take these rows out of the training data, or the evaluation measures memory"
    if whole or partly:
        remedy += f"; one of them: {questions[min(whole or partly)][:60]}"
    return Finding(name, FAIL, shown, remedy) if whole else graded(name, share, limits.overlap, shown, remedy)


def _covered(text: str, grams: set[tuple[str, ...]], n: int) -> float:
    """Share of the text's n-grams among these; 0 for a text that is too short to have one."""
    own = ngrams(words(text), n)
    return len(own & grams) / max(1, len(own))


def _key(*texts: str) -> tuple[str, ...]:
    return tuple(" ".join(word for word in words(text) if word[0].isalnum()) for text in texts)
