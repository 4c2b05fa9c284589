"""What is kept and shown of a step's rollouts: one row per completion, a parquet file, and the means.

Sample row: {"prompt_id": "word-1f…", "task": "word", "language": "en", "question": "…", "answer": "42",
"completion": "<think>\\n…", "length": 87, "truncated": False, "strategy": "careful", "reward": 1.2,
"advantage": 0.9, "has_variance": True, "trained": True, "scores": {"accuracy": 1.0, "format": 1.0},
"failed": []}
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.data.filters import repetition
from r1pipe.errors import EnvironmentProblem
from r1pipe.records import Group, Prompt, Status
from r1pipe.rewards import applies
from r1pipe.rl.advantages import has_variance, is_scored

Row = dict[str, Any]
# The words by which R1-Zero's authors counted reflection (R1, figure on the "aha moment"; English alone).
REFLECTIVE = re.compile(
    r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b", re.IGNORECASE
)
StrategyOf = Callable[[Prompt, str], str]
UNDER_ROLLOUT = {"accuracy": "accuracy", "format": "format_rate", "language": "language_consistency"}


def rows_of(groups: Sequence[Group], strategy_of: StrategyOf | None) -> list[Row]:
    """A row for each completion; the strategy only where the data source can tell it from the text."""
    rows = []
    for group in groups:
        prompt, differs = group.prompt, has_variance(group.rewards)
        told = strategy_of if strategy_of and applies(prompt) else None
        for completion, scores, reward, advantage in zip(
            group.completions, group.scores, group.rewards, group.advantages, strict=True
        ):
            good = {name: score.value for name, score in scores.items() if score.status is Status.SCORED}
            failed = [f"{name}: {s.status} ({s.detail})" for name, s in scores.items() if name not in good]
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
                    "strategy": told(prompt, completion.text) if told else None,
                    "reward": reward if is_scored(reward) else None,
                    "advantage": advantage,
                    "has_variance": differs,
                    "trained": group.trained,
                    "entropy": -fmean(completion.logprobs),
                    "scores": good,
                    "failed": failed,
                }
            )
    return rows


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """The step's metrics, over the completions of all ranks.

    `train/entropy` is the mean of -log pi over the drawn tokens: an unbiased estimate of the policy's entropy
    without another pass over the vocabulary. Raises EnvironmentProblem where nothing could be scored.
    """
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    if not rewards:
        failed = rows[0]["failed"][0]
        raise EnvironmentProblem(f"no completion could be scored ({failed}); mend the verifier and run again")
    lengths = [row["length"] for row in rows]
    metrics = {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/failed": 1 - len(rewards) / len(rows),
        "reward/zero_variance": fmean(not row["has_variance"] for row in rows),
        "rollout/length_mean": fmean(lengths),
        "rollout/length_max": float(max(lengths)),
        "rollout/truncation_rate": fmean(row["truncated"] for row in rows),
        "rollout/reflections": fmean(len(REFLECTIVE.findall(row["completion"])) for row in rows),
        "rollout/repetition": fmean(repetition(row["completion"]) for row in rows),
        "train/entropy": fmean((row["entropy"] for row in rows), weights=lengths),
    }
    metrics |= {f"reward/failed/{name}": share for name, share in failed_shares(rows).items()}
    for name in sorted({name for row in rows for name in row["scores"]}):
        mean = fmean(row["scores"][name] for row in rows if name in row["scores"])
        metrics[f"reward/{name}"] = mean
        if name in UNDER_ROLLOUT:
            metrics[f"rollout/{UNDER_ROLLOUT[name]}"] = mean
    told = Counter(row["strategy"] for row in rows if row["strategy"] is not None)
    return metrics | {f"strategy/{name}": count / told.total() for name, count in sorted(told.items())}


def failed_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Reward name -> the share of its verdicts in which a verifier or the infrastructure failed."""
    failed = Counter(line.partition(":")[0] for row in rows for line in row["failed"])
    given = Counter(name for row in rows for name in row["scores"])
    return {name: failed[name] / (failed[name] + given[name]) for name in sorted({*failed, *given})}


def stop_if_failing(metrics: Mapping[str, float], limit: float, rows: Sequence[Row]) -> None:
    """Raises EnvironmentProblem where more than `limit` of a reward's verdicts failed: the others would be a
    skewed choice of completions to learn from."""
    shares = {name: share for name, share in metrics.items() if name.startswith("reward/failed/")}
    worst = max(shares, key=lambda name: shares[name], default="")
    if worst and shares[worst] > limit:
        name = worst.rpartition("/")[2]
        why = next(line for row in rows for line in row["failed"] if line.startswith(f"{name}:"))
        raise EnvironmentProblem(
            f"{shares[worst]:.0%} of the step's {name} verdicts failed ({why}); "
            f"stage.rewards.max_failed={limit:g} allows no more: mend the verifier, or raise the limit"
        )


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """One parquet file, a column per reward component (null where it failed or does not apply)."""
    names = sorted({name for row in rows for name in row["scores"]})
    flat = [
        {**row, "failed": "; ".join(row["failed"]) or None}
        | {f"score_{name}": row["scores"].get(name, math.nan) for name in names}
        for row in rows
    ]
    for row in flat:
        del row["scores"], row["has_variance"]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(flat), path, compression="zstd")
