"""The judge of a job: opened once it has been found good enough, and summed up for the record."""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

from r1pipe.chat.answerer import AnswerParams
from r1pipe.core.types import Prompt
from r1pipe.data.source import Source
from r1pipe.rewards.judge.cache import AnswerCache
from r1pipe.rewards.judge.judging import Judge
from r1pipe.rewards.judge.measurement import HeldOut, Measurement, OwnAnswer
from r1pipe.runs.judge_quality import FORCE, check_judge, judge_of
from r1pipe.train.answering import open_answerer
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.run import Run

HELD_OUT_SEED = 0  # the same examples in every measurement
OWN_TEMPERATURE = 0.6  # R1's evaluation

Summary = dict[str, Any]


def open_judge(run: Run[Any], ranks: Ranks, kinds: Collection[str] | None = None) -> Judge:
    """The judge of `judge=`, for these kinds of questions (None: those the config tells). All ranks call.

    Raises CheckpointError where it was not measured or is too weak, and what open_answerer raises.
    """
    weaknesses = check_judge(run.config, kinds)
    if weaknesses:
        run.warn(f"judge={run.config.judge} is used because of {FORCE}, although {'; '.join(weaknesses)}")
    judge = open_unmeasured(run, ranks)
    judge.weaknesses = weaknesses
    return judge


def open_unmeasured(run: Run[Any], ranks: Ranks) -> Judge:
    """The judge of `judge=`, however good it is."""
    config = judge_of(run.config)
    named = run.config.judge_from or run.config.judge
    assert config is not None and named is not None
    answerer = open_answerer(run, ranks, "judge", named, config)
    return Judge(answerer, config, AnswerCache(run.folder.data, ranks.rank), run.seed("judge"))


def summary_of(run: Run[Any], ranks: Ranks, judge: Judge) -> Summary:
    """All ranks' judging for the record: counts of this session, costs of all. All ranks call."""
    each = ranks.all_gather_objects(judge.summary())
    total = AnswerCache(run.folder.data).spent  # of all ranks and sessions
    counted = ("verdicts_read", "verdicts_unread", "prompts_asked", "prompts_cached")
    costs = ("requests", "prompt_tokens", "completion_tokens", "seconds", "usd")
    return {
        **each[0],
        **{name: sum(summary[name] for summary in each) for name in counted},
        **{name: round(getattr(total, name), 6) for name in costs},
    }


# --- what a judge is measured on


def held_out(
    data: Source, judge: Judge, settings: Measurement, progress: Callable[[str, int, int], None]
) -> HeldOut:
    """The data's examples whose right verdict is known. The judge's own answers are among them where the data
    has a hidden truth."""
    split = settings.split
    pairs = data.preference_pairs(split, settings.pairs, HELD_OUT_SEED)
    labels = data.safety_labels(split, settings.labels, HELD_OUT_SEED)
    prompts = data.general_prompts(split, 4 * settings.references, HELD_OUT_SEED, {})
    answered = [prompt for prompt in prompts if prompt.answer]
    if not answered:
        drawn = data.prompts(split, 4 * settings.references, HELD_OUT_SEED)
        answered = [prompt for prompt in drawn if prompt.answer]
    references = right_and_wrong(answered)[: 2 * settings.references]
    own: list[OwnAnswer] = []
    if truth := data.truth:
        params = AnswerParams(
            *(judge.config.max_tokens, OWN_TEMPERATURE, 1.0, 1, judge.seed, judge.config.max_num_seqs)
        )
        some, rng = pairs[: settings.own], random.Random(HELD_OUT_SEED)
        mine = judge.texts([pair.prompt for pair in some], params, lambda *done: progress("own", *done))
        for pair, [text] in zip(some, mine, strict=True):
            other = rng.choice([pair.chosen, pair.rejected])
            gain = truth(pair.prompt, text).helpful - truth(pair.prompt, other).helpful
            own.append(OwnAnswer(pair.prompt, text, other, gain > 0 if gain else None))
    return HeldOut(pairs, labels, references, own)


def right_and_wrong(prompts: Sequence[Prompt]) -> list[tuple[Prompt, str, bool]]:
    """Each prompt with its answer, and with that of the next prompt of its kind that has another."""
    by_kind: dict[tuple[str, str], list[Prompt]] = {}
    for prompt in prompts:
        by_kind.setdefault((prompt.task, prompt.language), []).append(prompt)
    found = []
    for place, prompt in enumerate(prompts):
        others = [other.answer for other in by_kind[prompt.task, prompt.language]]
        others = [other for other in others if other.strip().lower() != prompt.answer.strip().lower()]
        if others:
            found += [(prompt, prompt.answer, True), (prompt, others[place % len(others)], False)]
    return found
