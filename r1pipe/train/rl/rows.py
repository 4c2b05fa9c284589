"""A step's rollouts as rows, one per completion: the parquet file, the metrics and the sample on screen.

Sample row: {"prompt_id": "word-1f…", "task": "word", "language": "en", "question": "…", "answer": "42",
"completion": "<think>\\n…", "length": 87, "truncated": False, "repetition": 0.1, "strategy": "careful",
"reward": 1.2, "advantage": 0.9, "has_variance": True, "trained": True, "entropy": 0.4,
"scores": {"accuracy": 1.0, "format": 1.0}, "failed": [], "context": None, "source": "world",
"licence": "Apache-2.0"}

The context is the JSON of the messages before the question, if there were any; source and licence are the
prompt's.

Metric names are TRL's where it has them; docs/metrics.md lists all.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from operator import itemgetter
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.core.reflection import reflects
from r1pipe.core.types import Group, Prompt, Status
from r1pipe.rewards import is_verifiable
from r1pipe.runs.files import replacing
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rl.advantages import has_variance, is_scored
from r1pipe.train.rl.scoring import KL
from r1pipe.train.sft.filters import repetition

Row = dict[str, Any]
# The words that R1-Zero's authors count as reflection (R1, figure on the "aha moment"; English only).
REFLECTIVE = re.compile(
    r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b", re.IGNORECASE
)
SHOWN_END = 1000  # characters shown of either end of a long text
StrategyOf = Callable[[Prompt, str], str]
# The columns of a step's file, besides one per reward. The types are fixed so that `r1pipe samples` can read
# many steps as one table, although a column may be all null in one of them.
COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("prompt_id", "task", "language", "question", "answer")),
        *(("completion", pa.string()), ("length", pa.int64()), ("truncated", pa.bool_())),
        *(("repetition", pa.float64()), ("strategy", pa.string()), ("reward", pa.float64())),
        *(("advantage", pa.float64()), ("trained", pa.bool_()), ("entropy", pa.float64())),
        *((name, pa.string()) for name in ("failed", "context", "source", "licence")),
    ]
)


def rows_of(groups: Sequence[Group], strategy_of: StrategyOf | None) -> list[Row]:
    """A row for each completion."""
    rows = []
    for group in groups:
        prompt, variance = group.prompt, has_variance(group.rewards)
        before = [asdict(message) for message in prompt.context]
        context = json.dumps(before, ensure_ascii=False) if before else None
        recognise = strategy_of if strategy_of and is_verifiable(prompt) else None
        parts = zip(group.completions, group.scores, group.rewards, group.advantages, strict=True)
        for place, (completion, scores, reward, advantage) in enumerate(parts):
            values = {name: score.value for name, score in scores.items() if score.status is Status.SCORED}
            failed = [f"{name}: {s.status} ({s.detail})" for name, s in scores.items() if name not in values]
            rows.append(
                {
                    "prompt_id": prompt.id,
                    "task": prompt.task,
                    "language": prompt.language,
                    "question": prompt.question,
                    "answer": prompt.answer,
                    "completion": completion.text,
                    "length": len(completion.tokens),
                    "truncated": completion.truncated,
                    "repetition": repetition(completion.text),
                    "strategy": recognise(prompt, completion.text) if recognise else None,
                    "reward": reward if is_scored(reward) else None,
                    "advantage": advantage,
                    "has_variance": variance,
                    "reflects": reflects(completion.text, prompt.checker),
                    "trained": group.trained and (group.kept is None or place in group.kept),
                    "entropy": -fmean(completion.logprobs),
                    "scores": values,
                    "failed": failed,
                    "context": context,
                    "source": prompt.source or None,
                    "licence": prompt.licence,
                }
            )
    return rows


def rows_of_all(ranks: Ranks, groups: Sequence[Group], strategy_of: StrategyOf | None) -> list[Row]:
    """The rows of every rank's groups, in sampling order."""
    placed = [(group.place, rows_of([group], strategy_of)) for group in groups]
    of_all = sorted(chain.from_iterable(ranks.all_gather_objects(placed)), key=itemgetter(0))
    return [row for _, rows in of_all for row in rows]


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """The metrics of a step's completions; there is no `reward` where nothing could be scored."""
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    lengths = [row["length"] for row in rows]
    metrics = {"reward": fmean(rewards), "reward_std": pstdev(rewards)} if rewards else {}
    with_kl = [row for row in rows if KL in row["scores"] and row["reward"] is not None]
    if with_kl:  # a KL in the loss is measured by the update
        metrics["kl"] = sum(row["scores"][KL] for row in with_kl) / sum(row["length"] for row in with_kl)
    metrics |= {
        "frac_reward_zero_std": fmean(not row["has_variance"] for row in rows),
        "frac_reward_failed": 1 - len(rewards) / len(rows),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(row["truncated"] for row in rows),
        "completions/reflections": fmean(len(REFLECTIVE.findall(row["completion"])) for row in rows),
        "reflection_rate": fmean(row["reflects"] for row in rows),
        "completions/repetition": fmean(row["repetition"] for row in rows),
        # the mean of -log pi over the sampled tokens: an unbiased estimate
        "entropy": fmean((row["entropy"] for row in rows), weights=lengths),
    }
    for name in sorted({name for row in rows for name in row["scores"]}):
        values = [row["scores"][name] for row in rows if name in row["scores"]]
        metrics |= {f"rewards/{name}/mean": fmean(values), f"rewards/{name}/std": pstdev(values)}
    failed = Counter(line.partition(":")[0] for row in rows for line in row["failed"])
    scored = Counter(name for row in rows for name in row["scores"])
    for name in sorted({*failed, *scored}):
        metrics[f"rewards/{name}/failed"] = failed[name] / (failed[name] + scored[name])
    strategies = Counter(row["strategy"] for row in rows if row["strategy"] is not None)
    return metrics | {
        f"strategy/{name}": count / strategies.total() for name, count in sorted(strategies.items())
    }


def sample_of(rows: Sequence[Row], rng: np.random.Generator) -> dict[str, Any]:
    """One completion for the screen, of a trained group with variance where there is one."""
    candidates = [row for row in rows if row["trained"] and row["has_variance"]] or list(rows)
    row = candidates[rng.integers(len(candidates))]
    lines, text = row["question"].strip().splitlines() or [""], row["completion"]
    if len(text) > 2 * SHOWN_END:
        text = f"{text[:SHOWN_END]} … {text[-SHOWN_END:]}"
    kept = {name: row[name] for name in ("task", "reward", "advantage", "truncated")}
    return {**kept, "question": lines[-1][-SHOWN_END:], "completion": text}


def speeds(rows: Sequence[Row], metrics: Mapping[str, float], step_s: float) -> dict[str, float]:
    """Sampled tokens per second, while sampling and over the whole step."""
    tokens = sum(row["length"] for row in rows)
    return {
        "time/step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "sampling/tokens_per_s": tokens / metrics["time/sampling_s"],
    }


def most_failed(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """The reward with the greatest share of failed verdicts, and that share; None without any reward."""
    shares = {name.split("/")[1]: share for name, share in metrics.items() if name.endswith("/failed")}
    return max(shares.items(), key=lambda named: named[1], default=None)


def too_many_failures(metrics: Mapping[str, float], limit: float, rows: Sequence[Row]) -> str:
    """Why a step must not train, or "": more than `limit` of a reward's verdicts failed, and the completions
    that are left would be a biased choice."""
    if "reward" not in metrics:
        return f"no completion could be scored ({rows[0]['failed'][0]}); fix the verifier"
    name, share = most_failed(metrics) or ("", 0.0)
    if share <= limit:
        return ""
    why = next(line for row in rows for line in row["failed"] if line.startswith(f"{name}:"))
    return (
        f"{share:.0%} of the {name} verdicts failed ({why}); "
        f"stage.rewards.max_failed={limit:g} allows no more: fix the verifier, or raise the limit"
    )


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """One parquet file, atomically; a column per reward is null where it failed or does not apply."""
    names = sorted({name for row in rows for name in row["scores"]})
    schema = pa.schema([*COLUMNS, *((f"score_{name}", pa.float64()) for name in names)])
    flat = [
        {**row, "failed": "; ".join(row["failed"]) or None}
        | {f"score_{name}": row["scores"].get(name) for name in names}
        for row in rows
    ]
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(flat, schema), temporary, compression="zstd")
