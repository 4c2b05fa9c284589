"""Verdicts -> the numbers of evaluation.json, as pure functions; null where there is nothing to count."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

from r1pipe.config import EvalConfig
from r1pipe.core.estimates import clustered_interval, majority, majority_in_blocks, mean, pass_at, quantile
from r1pipe.core.types import HELPFUL_TASKS, Prompt
from r1pipe.data.world.truth import Truth
from r1pipe.runs.record import Metrics
from r1pipe.train.evaluation.verdicts import GeneralVerdict, Verdict


def logged(metrics: Metrics) -> dict[str, float]:
    """An evaluation under the names of metrics.jsonl, without values that are None."""
    names = ["pass_at_1", "greedy", "format_rate", "language_consistency", "length_mean", "truncation_rate"]
    names += ["reflection_rate", "level_4"]
    names += ["general_score", "preference_score"]
    values: dict[str, Any] = {f"eval/{name}": value for name, value in metrics.items() if name in names}
    by_task = metrics["by_task"] or {}
    values |= {f"eval/{task}/pass_at_1": part["pass_at_1"] for task, part in by_task.items()}
    return {name: value for name, value in values.items() if value is not None}


def measure(
    prompts: Sequence[Prompt],
    sampled: list[Verdict],
    greedy: list[Verdict],
    config: EvalConfig,
    harder: tuple[Sequence[Prompt], list[Verdict]] = ((), []),
) -> Metrics:
    """The reasoning part of evaluation.json: overall, by task, language, level and subject.

    `harder`: problems above `data.levels` and their verdicts, which count by level alone.
    """

    def by(key: str) -> dict[str, Metrics]:
        """For each value of the key that any prompt has; "" and level 0 are none."""

        def of(rows: list[Verdict], value: Any) -> list[Verdict]:
            return [v for v in rows if getattr(prompts[v.problem], key) == value]

        values = sorted({getattr(prompt, key) for prompt in prompts if getattr(prompt, key)})
        return {str(value): summarise(of(sampled, value), of(greedy, value)) for value in values}

    above = [(harder[0][v.problem].level, v) for v in harder[1]]
    levels = by("level")
    for level in sorted({of for of, _ in above}):
        levels[str(level)] = summarise([v for of, v in above if of == level], [])
    strategies = Counter(v.strategy for v in sampled if v.strategy)
    return {
        **summarise(sampled, greedy),
        **curves(sampled, config.samples),
        "k": config.samples,
        "lengths": lengths(sampled),
        "pass_at_1_within": within(sampled, config.max_tokens),
        "by_task": by("task"),
        "by_language": by("language"),
        "by_level": levels,
        "level_4": levels.get("4", {}).get("pass_at_1"),
        "by_subject": by("subject"),
        "strategies": {name: n / strategies.total() for name, n in sorted(strategies.items())},
    }


def summarise(sampled: list[Verdict], greedy: list[Verdict]) -> Metrics:
    """pass@1, cons@k and the rest for one set of completions; null if there is nothing to count.

    pass@1 (R1 section 3): the mean over scored samples; `samples` counts all, `unscored` those whose verifier
    or sandbox failed. cons@k: the share of problems whose most frequent answer is right. Format, language,
    length and truncation are means over all samples.
    """
    problems = by_problem(sampled)
    scored = scored_only(problems)
    outcomes = [[float(bool(v.correct)) for v in rows] for rows in scored]
    elected = [majority([(v.vote, bool(v.correct)) for v in rows]) for rows in scored if rows]
    f1s = [v.f1 for v in sampled if v.f1 is not None]
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
        "reflection_rate": mean(float(v.reflects) for v in sampled),
        **({"f1": mean(f1s)} if f1s else {}),
    }


def by_problem(verdicts: list[Verdict]) -> dict[int, list[Verdict]]:
    problems: dict[int, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        problems[verdict.problem].append(verdict)
    return problems


def scored_only(problems: dict[int, list[Verdict]]) -> list[list[Verdict]]:
    return [[v for v in rows if v.correct is not None] for rows in problems.values()]


def curves(sampled: list[Verdict], samples: int) -> Metrics:
    """pass@j and maj@j for j = 1, 2, 4 ... and k, each a mean over the problems with j scored samples.

    pass@j: unbiased (`estimates.pass_at`); maj@j: of blocks of j samples (`estimates.majority_in_blocks`), so
    that maj@1 is pass@1, and maj@k is cons@k.
    """
    scored = scored_only(by_problem(sampled))
    sizes = [2**power for power in range(samples.bit_length()) if 2**power < samples] + [samples]
    passed, elected = {}, {}
    for size in sizes:
        enough = [rows for rows in scored if len(rows) >= size]
        of_size = (pass_at(len(rows), sum(bool(v.correct) for v in rows), size) for rows in enough)
        passed[str(size)] = mean(of_size)
        votes = ([(v.vote, bool(v.correct)) for v in rows] for rows in enough)
        shares = (majority_in_blocks(rows, size) for rows in votes)
        elected[str(size)] = mean(share for share in shares if share is not None)
    return {"pass_at_k": passed, "maj_at_k": elected}


def lengths(sampled: list[Verdict]) -> dict[str, float | None]:
    """Tokens of the sampled completions; means of the right and of the wrong ones."""
    tokens = [float(v.length) for v in sampled]
    return {
        "median": quantile(tokens, 0.5),
        "p95": quantile(tokens, 0.95),
        "max": max(tokens, default=None),
        "right": mean(v.length for v in sampled if v.correct is True),
        "wrong": mean(v.length for v in sampled if v.correct is False),
    }


def within(sampled: list[Verdict], most: int) -> dict[str, float | None]:
    """pass@1 if a completion may have so many tokens: 16, 24, 32, 48 ... and `most`.

    A longer one would have been cut off before its answer.
    """
    scored = [v for v in sampled if v.correct is not None]
    allowed = sorted(
        {n for power in range(4, 20) for n in (2**power, 3 * 2 ** (power - 1)) if n < most} | {most}
    )
    return {str(n): mean(float(bool(v.correct) and v.length <= n) for v in scored) for n in allowed}


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
