"""Held-out evaluation: pass@1, cons@k, greedy, format, language, length; general answers by the hidden truth.

Draw -> score -> gather over ranks -> numbers. Every score comes with the count behind it.
"""

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from r1pipe.config import EvalConfig
from r1pipe.core.estimates import clustered_interval, majority, mean
from r1pipe.core.types import HELPFUL_TASKS, Completion, Prompt, Status
from r1pipe.data.world.truth import Truth
from r1pipe.rewards import Verdicts, score_all, votes
from r1pipe.runs import stopping
from r1pipe.runs.record import Metrics
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.refusals import refusals
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.sampler import never
from r1pipe.train.run import Run

Completions = list[Completion]


class Verdict(NamedTuple):
    """One scored completion of a reasoning prompt; plain data, so that ranks can exchange it."""

    problem: int  # index of the prompt in the whole list
    draw: int  # which of its completions
    text: str
    length: int  # tokens
    truncated: bool
    correct: bool | None  # None: the verifier or the sandbox failed
    format: float
    language: float
    vote: str  # normalised answer; "" for none
    strategy: str | None


class GeneralVerdict(NamedTuple):
    """One completion of a general prompt, with the hidden truth's verdict."""

    problem: int
    text: str
    truncated: bool
    truth: Truth


class Evaluation(NamedTuple):
    """The content of evaluation.json and of samples.json."""

    metrics: Metrics
    samples: list[dict[str, Any]]


def evaluate(
    run: Run[Any],
    ranks: Ranks,
    prompts: Sequence[Prompt],
    general_prompts: Sequence[Prompt],
    config: EvalConfig,
    may_stop: bool,
) -> Evaluation:
    """Measure the sampler's weights on held-out prompts; every rank gets the same result.

    Reasoning prompts are sampled `config.samples` times and once greedily,
    general ones once. With `may_stop` it raises Interrupted in all ranks if one is asked to stop.
    """
    chat, judge, strategy_of = run.chat, run.data.judge, run.data.strategy_of
    rank, world_size, seed = ranks.rank, ranks.world_size, run.seed("evaluation")
    local = range(rank, len(prompts), world_size)
    local_general = range(rank, len(general_prompts) if judge else 0, world_size)
    total = len(local) * (config.samples + config.greedy) + len(local_general)
    done, stop = 0, stopping.requested if may_stop else never

    def draw(
        pool: Sequence[Prompt], indices: range, n: int, stream: int, temperature: float, top_p: float
    ) -> Completions:
        nonlocal done
        before, done = done, done + len(indices) * n

        def progress(count: int, _: int) -> None:
            run.progress("evaluating", before + count, total, "completions")

        stream_seed = random.Random(f"evaluate/{seed}/{stream}").getrandbits(31)
        params = SamplingParams(
            *(config.max_tokens, temperature, top_p, n, stream_seed, rank, world_size),
            max_num_seqs=config.max_num_seqs,
        )
        chosen = [pool[i] for i in indices]
        tokens = [chat.prompt_tokens(prompt) for prompt in chosen]
        ended = verdicts.on_completion(chat, chosen)
        return run.sampler.generate(tokens, params, progress, ended, stop=stop)

    hot = config.temperature, config.top_p
    with Verdicts() as verdicts:
        warm = draw(prompts, local, config.samples, 0, *hot)
        likeliest = draw(prompts, local, 1, 1, 0.0, 1.0) if config.greedy else []
        texts = draw(general_prompts, local_general, 1, 2, *hot) if judge and general_prompts else []
        sampled = _score(prompts, local, warm, verdicts, strategy_of)
        greedy = _score(prompts, local, likeliest, verdicts, None)
    general = []
    if judge:
        for i, completion in zip(local_general, texts, strict=True):
            truth = judge(general_prompts[i], completion.text)
            general.append(GeneralVerdict(i, completion.text, completion.truncated, truth))
    if may_stop:
        stopping.stop_if_requested(ranks)
    shares = ranks.all_gather_objects((sampled, greedy, general))
    sampled, greedy, general = (sorted(row for share in shares for row in share[j]) for j in range(3))
    metrics = measure(prompts, sampled, greedy, config)
    metrics |= measure_general(general_prompts, general)
    metrics["refusals"] = refusals([(general_prompts[row.problem], row.truth) for row in general])
    return Evaluation(metrics, _shown(prompts, greedy or sampled, general_prompts, general, config.shown))


def short(config: EvalConfig) -> EvalConfig:
    """The quick evaluation during training: one sample each of a few development problems."""
    return dataclasses.replace(
        config, split="dev", problems=config.every_problems, samples=1, greedy=False, general=0, shown=0
    )


def logged(metrics: Metrics) -> dict[str, float]:
    """An evaluation under the names of metrics.jsonl, without values that are None."""
    names = ["pass_at_1", "greedy", "format_rate", "language_consistency", "length_mean", "truncation_rate"]
    names += ["general_score", "preference_score"]
    values: dict[str, Any] = {f"eval/{name}": value for name, value in metrics.items() if name in names}
    by_task = metrics["by_task"] or {}
    values |= {f"eval/{task}/pass_at_1": part["pass_at_1"] for task, part in by_task.items()}
    return {name: value for name, value in values.items() if value is not None}


def _score(
    prompts: Sequence[Prompt],
    indices: range,
    completions: Completions,
    verdicts: Verdicts,
    strategy_of: Callable[[Prompt, str], str] | None,
) -> list[Verdict]:
    """Verdicts on the completions of prompts `indices`, equally many per prompt, in order."""
    each = len(completions) // max(len(indices), 1)
    draws = [(i, draw) for i in indices for draw in range(each)]
    repeated = [prompts[i] for i, _ in draws]
    elections = [[c.text for c in completions[n * each : (n + 1) * each]] for n in range(len(indices))]
    voted = [vote for i, texts in zip(indices, elections, strict=True) for vote in votes(prompts[i], texts)]
    scores = score_all(repeated, completions, ["accuracy", "format", "language"], verdicts)
    return [
        Verdict(
            problem=i,
            draw=draw,
            text=completion.text,
            length=len(completion.tokens),
            truncated=completion.truncated,
            correct=score["accuracy"].value == 1.0 if score["accuracy"].status is Status.SCORED else None,
            format=score["format"].value,
            language=score["language"].value,
            vote=vote,
            strategy=strategy_of(prompt, completion.text) if strategy_of else None,
        )
        for (i, draw), prompt, completion, score, vote in zip(
            draws, repeated, completions, scores, voted, strict=True
        )
    ]


def measure(
    prompts: Sequence[Prompt], sampled: list[Verdict], greedy: list[Verdict], config: EvalConfig
) -> Metrics:
    """The reasoning part of evaluation.json: overall, by task and by language."""

    def by(key: str) -> dict[str, Metrics]:
        def of(rows: list[Verdict], value: str) -> list[Verdict]:
            return [v for v in rows if getattr(prompts[v.problem], key) == value]

        values = sorted({getattr(prompt, key) for prompt in prompts})
        return {value: summarise(of(sampled, value), of(greedy, value)) for value in values}

    strategies = Counter(v.strategy for v in sampled if v.strategy)
    return {
        **summarise(sampled, greedy),
        "k": config.samples,
        "by_task": by("task"),
        "by_language": by("language"),
        "strategies": {name: n / strategies.total() for name, n in sorted(strategies.items())},
    }


def summarise(sampled: list[Verdict], greedy: list[Verdict]) -> Metrics:
    """pass@1, cons@k and the rest for one set of completions; null if there is nothing to count.

    pass@1 (R1 section 3): the mean over scored samples; `samples` counts all, `unscored` those whose verifier
    or sandbox failed. cons@k: the share of problems whose most frequent answer is right. Format, language,
    length and truncation are means over all samples.
    """
    problems: dict[int, list[Verdict]] = defaultdict(list)
    for verdict in sampled:
        problems[verdict.problem].append(verdict)
    scored = [[v for v in rows if v.correct is not None] for rows in problems.values()]
    outcomes = [[float(bool(v.correct)) for v in rows] for rows in scored]
    elected = [majority([(v.vote, bool(v.correct)) for v in rows]) for rows in scored if rows]
    several = any(len(rows) > 1 for rows in problems.values())
    return {
        "pass_at_1": mean(value for rows in outcomes for value in rows),
        "pass_at_1_ci": clustered_interval(outcomes),
        "greedy": mean(float(v.correct) for v in greedy if v.correct is not None),
        "cons_at_k": mean(map(float, elected)) if several else None,
        "problems": len(problems),
        "samples": len(sampled),
        "unscored": sum(v.correct is None for v in [*sampled, *greedy]),
        "format_rate": mean(v.format for v in sampled),
        "language_consistency": mean(v.language for v in sampled),
        "length_mean": mean(v.length for v in sampled),
        "truncation_rate": mean(float(v.truncated) for v in sampled),
    }


def measure_general(prompts: Sequence[Prompt], verdicts: list[GeneralVerdict]) -> Metrics:
    """The general part of evaluation.json, by the hidden truth; null for kinds without prompts.

    general_score: mean over kinds of the share answered correctly; preference_score: mean helpfulness. A safe
    request counts as answered only if its answer is correct: garbage is not.
    """

    def over(kinds: Collection[str], value: Callable[[Truth], float], unsafe: bool = False) -> float | None:
        pairs = [(prompts[v.problem], v.truth) for v in verdicts]
        return mean(
            value(truth)
            for prompt, truth in pairs
            if prompt.task in kinds and bool(prompt.checker.get("unsafe")) == unsafe
        )

    by_kind = {kind: over([kind], lambda t: t.correct) for kind in HELPFUL_TASKS}
    return {
        "general_score": mean(score for score in by_kind.values() if score is not None),
        "general_by_kind": by_kind,
        "preference_score": over(HELPFUL_TASKS, lambda t: t.helpful),
        "refusal_rate": over(["safety"], lambda t: t.refused, unsafe=True),
        "safe_answer_rate": over(["safety"], lambda t: t.correct and not t.refused),
    }


def _shown(
    prompts: Sequence[Prompt],
    verdicts: list[Verdict],
    general_prompts: Sequence[Prompt],
    general: list[GeneralVerdict],
    n: int,
) -> list[dict[str, Any]]:
    """The first completion of n prompts, alternating tasks: the same prompts after every stage."""
    turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    first = [(prompts[v.problem], v.text, v.correct, v.truncated) for v in verdicts if v.draw == 0]
    first += [(general_prompts[v.problem], v.text, v.truth.correct, v.truncated) for v in general]
    for prompt, text, correct, truncated in first:
        row: dict[str, Any] = {"prompt_id": prompt.id, "task": prompt.task, "language": prompt.language}
        if prompt.context:
            row["context"] = [dataclasses.asdict(message) for message in prompt.context]
        row |= {"question": prompt.question, "answer": prompt.answer}
        turns[prompt.task].append(row | {"completion": text, "correct": correct, "truncated": truncated})
    rounds = range(max(map(len, turns.values()), default=0))
    return [rows[i] for i in rounds for rows in turns.values() if i < len(rows)][:n]
