"""What is kept and shown of a step's rollouts: one row per completion, a parquet file, and the metrics.

Sample row: {"prompt_id": "word-1f…", "task": "word", "language": "en", "question": "…", "answer": "42",
"completion": "<think>\\n…", "length": 87, "truncated": False, "repetition": 0.1, "strategy": "careful",
"reward": 1.2, "advantage": 0.9, "has_variance": True, "trained": True, "entropy": 0.4,
"scores": {"accuracy": 1.0, "format": 1.0}, "failed": []}

The metrics' names are TRL's where it has them; docs/metrics.md lists all of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.core.types import Group, Prompt, Status
from r1pipe.rewards import applies
from r1pipe.runs.files import replacing
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rl.advantages import has_variance, is_scored
from r1pipe.train.rl.scoring import KL
from r1pipe.train.sft.filters import repetition

Row = dict[str, Any]
# The words by which R1-Zero's authors counted reflection (R1, figure on the "aha moment"; English alone).
REFLECTIVE = re.compile(
    r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b", re.IGNORECASE
)
SHOWN_END = 1000  # characters of a long text that the screen gets of either end
StrategyOf = Callable[[Prompt, str], str]
# The columns of a step's file, besides one for each reward. The types are given, not guessed: in one step no
# completion may have failed, or none have a strategy, and `r1pipe samples` reads many steps as one table.
COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("prompt_id", "task", "language", "question", "answer")),
        *(("completion", pa.string()), ("length", pa.int64()), ("truncated", pa.bool_())),
        *(("repetition", pa.float64()), ("strategy", pa.string()), ("reward", pa.float64())),
        *(("advantage", pa.float64()), ("trained", pa.bool_()), ("entropy", pa.float64())),
        ("failed", pa.string()),
    ]
)


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
                    "repetition": repetition(completion.text),
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


def rows_of_all(ranks: Ranks, groups: Sequence[Group], strategy_of: StrategyOf | None) -> list[Row]:
    """The rows of every rank's groups, in the order of drawing."""
    mine = [(group.place, rows_of([group], strategy_of)) for group in groups]
    found = sorted(chain.from_iterable(ranks.all_gather_objects(mine)), key=itemgetter(0))
    return [row for _, rows in found for row in rows]


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """The step's metrics, over the completions of all ranks.

    `entropy` is the mean of -log pi over the drawn tokens: an unbiased estimate of the policy's entropy
    without another pass over the vocabulary. There is no `reward` where nothing could be scored.
    """
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    lengths = [row["length"] for row in rows]
    metrics = {"reward": fmean(rewards), "reward_std": pstdev(rewards)} if rewards else {}
    metrics |= kl_per_token(rows) | {
        "frac_reward_zero_std": fmean(not row["has_variance"] for row in rows),
        "frac_reward_failed": 1 - len(rewards) / len(rows),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(row["truncated"] for row in rows),
        "completions/reflections": fmean(len(REFLECTIVE.findall(row["completion"])) for row in rows),
        "completions/repetition": fmean(row["repetition"] for row in rows),
        "entropy": fmean((row["entropy"] for row in rows), weights=lengths),
    }
    for name in sorted({name for row in rows for name in row["scores"]}):
        values = [row["scores"][name] for row in rows if name in row["scores"]]
        metrics |= {f"rewards/{name}/mean": fmean(values), f"rewards/{name}/std": pstdev(values)}
    metrics |= {f"rewards/{name}/failed": share for name, share in failed_shares(rows).items()}
    told = Counter(row["strategy"] for row in rows if row["strategy"] is not None)
    return metrics | {f"strategy/{name}": count / told.total() for name, count in sorted(told.items())}


def sample_of(rows: Sequence[Row], rng: np.random.Generator) -> dict[str, Any]:
    """One completion for the screen, of a group that teaches where there is one: the last line of its prompt,
    what it earned, and its text, of which a long one loses its middle."""
    telling = [row for row in rows if row["trained"] and row["has_variance"]] or list(rows)
    row = telling[rng.integers(len(telling))]
    lines, text = row["question"].strip().splitlines() or [""], row["completion"]
    if len(text) > 2 * SHOWN_END:
        text = f"{text[:SHOWN_END]} … {text[-SHOWN_END:]}"
    kept = {name: row[name] for name in ("task", "reward", "advantage", "truncated")}
    return {**kept, "question": lines[-1][-SHOWN_END:], "completion": text}


def speeds(rows: Sequence[Row], metrics: Mapping[str, float], step_s: float) -> dict[str, float]:
    """Sampled tokens a second, while sampling and over the whole step of `step_s` seconds."""
    tokens = sum(row["length"] for row in rows)
    return {
        "time/step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "sampling/tokens_per_s": tokens / metrics["time/sampling_s"],
    }


def kl_per_token(rows: Sequence[Row]) -> dict[str, float]:
    """`kl` where it is in the reward: nats a token over the judged completions, as they were drawn.

    Where it is in the loss, the update measures it.
    """
    judged = [row for row in rows if KL in row["scores"] and row["reward"] is not None]
    tokens = sum(row["length"] for row in judged)
    return {"kl": sum(row["scores"][KL] for row in judged) / tokens} if tokens else {}


def failed_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Reward name -> the share of its verdicts in which a verifier or the infrastructure failed."""
    failed = Counter(line.partition(":")[0] for row in rows for line in row["failed"])
    given = Counter(name for row in rows for name in row["scores"])
    return {name: failed[name] / (failed[name] + given[name]) for name in sorted({*failed, *given})}


def most_failed(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """The reward of which the greatest share of verdicts failed, and that share; None without any reward."""
    shares = {name.split("/")[1]: share for name, share in metrics.items() if name.endswith("/failed")}
    return max(shares.items(), key=lambda named: named[1], default=None)


def too_many_failures(metrics: Mapping[str, float], limit: float, rows: Sequence[Row]) -> str:
    """Why nothing may be learned from a step; empty where all is well.

    Where more than `limit` of a reward's verdicts failed, the others would be a skewed choice of completions.
    """
    if "reward" not in metrics:
        return f"no completion could be scored ({rows[0]['failed'][0]}); mend the verifier"
    name, share = most_failed(metrics) or ("", 0.0)
    if share <= limit:
        return ""
    why = next(line for row in rows for line in row["failed"] if line.startswith(f"{name}:"))
    return (
        f"{share:.0%} of the {name} verdicts failed ({why}); "
        f"stage.rewards.max_failed={limit:g} allows no more: mend the verifier, or raise the limit"
    )


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """One parquet file, a column per reward component (null where it failed or does not apply).

    It is put in place when it is whole, so that a kill leaves none that cannot be read.
    """
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
