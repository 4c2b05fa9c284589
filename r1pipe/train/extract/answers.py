"""Scores of a teacher's answers: by the data's gold answers, or by what most answers agree on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from r1pipe.core.errors import DataError
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.rewards import Verdicts, score_all
from r1pipe.rewards.accuracy import check_gold, is_verifiable, summary_of
from r1pipe.rewards.answers.reading import last_stated
from r1pipe.train.sft.filters import Sampled

Answered = tuple[Prompt, list[Completion]]
BASE = ["format", "language"]
AGREE = 2  # fewer answers do not agree with anything


def scored(answered: Sequence[Answered], min_agreement: float, checked: bool = True) -> list[Sampled]:
    """Each answer with its rule scores, in order. Where a problem has no gold answer, the one that most of
    its answers state becomes it, if at least the share `min_agreement` does. `checked`: false for questions
    that no rule can check."""
    repeated: list[Prompt] = []
    known: set[str] = set()
    for prompt, completions in answered:
        gold = prompt
        if checked and is_verifiable(prompt) and not prompt.answer and not prompt.checker:
            gold = with_majority(prompt, completions, min_agreement)
        if gold.answer or gold.checker:
            known.add(gold.id)
        repeated += [gold] * len(completions)
    drawn = [completion for _, completions in answered for completion in completions]
    scores: list[dict[str, Score]] = score_all(repeated, drawn, BASE)
    if checked:
        with_gold = [
            i for i, prompt in enumerate(repeated) if prompt.id in known or not is_verifiable(prompt)
        ]
        with Verdicts() as verdicts:
            found = score_all(
                [repeated[i] for i in with_gold], [drawn[i] for i in with_gold], ["accuracy"], verdicts
            )
        unknown = {"accuracy": Score(0.0, detail="too few answers agree")}
        of_rule = dict(zip(with_gold, found, strict=True))
        scores = [own | of_rule.get(i, unknown) for i, own in enumerate(scores)]
    return [Sampled(*row) for row in zip(repeated, drawn, scores, strict=True)]


def with_majority(prompt: Prompt, completions: Sequence[Completion], min_agreement: float) -> Prompt:
    """The prompt with the final answer that most completions state (self-consistency, arXiv 2203.11171) as
    its gold answer; without one, where fewer than the share `min_agreement` of all agree."""
    stated = [
        last_stated(summary_of(completion.text)) or ""
        for completion in completions
        if not completion.truncated
    ]
    votes = Counter(filter(None, stated))
    if not votes:
        return prompt
    [(answer, count)] = votes.most_common(1)
    elected = replace(prompt, answer=answer)
    try:
        check_gold(elected)
    except DataError:  # a sentence, or nothing that could be compared
        return prompt
    return elected if count >= max(AGREE, min_agreement * len(completions)) else prompt
