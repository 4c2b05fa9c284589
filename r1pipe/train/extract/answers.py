"""Scores of a teacher's answers: by the data's gold answers, or by what most answers agree on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from r1pipe.core.errors import DataError
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.rewards import score_all
from r1pipe.rewards.accuracy import check_gold, is_verifiable, summary_of
from r1pipe.rewards.answers.reading import last_stated
from r1pipe.train.sft.filters import Sampled

Answered = tuple[Prompt, list[Completion]]
BASE = ["format", "language"]
AGREE = 2  # fewer answers do not agree with anything


def scored(answered: Sequence[Answered], min_agreement: float) -> list[Sampled]:
    """Each answer with its rule scores, in order. Where a problem has no gold answer, the one that most of
    its answers state becomes it, if at least the share `min_agreement` does."""
    repeated: list[Prompt] = []
    for prompt, completions in answered:
        gold = with_majority(prompt, completions, min_agreement) if lacks_gold(prompt) else prompt
        repeated += [gold] * len(completions)
    drawn = [completion for _, completions in answered for completion in completions]
    places = [i for i, prompt in enumerate(repeated) if not lacks_gold(prompt)]
    found = score_all([repeated[i] for i in places], [drawn[i] for i in places], ["accuracy"])
    accuracy = dict(zip(places, found, strict=True))  # empty where no rule applies
    no_gold = {"accuracy": Score(0.0, detail="too few answers agree")}
    scores = [own | accuracy.get(i, no_gold) for i, own in enumerate(score_all(repeated, drawn, BASE))]
    return [Sampled(*row) for row in zip(repeated, drawn, scores, strict=True)]


def lacks_gold(prompt: Prompt) -> bool:
    """Whether a rule could check an answer, if only the right one were known."""
    return is_verifiable(prompt) and not prompt.answer and not prompt.checker


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
