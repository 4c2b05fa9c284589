"""Sicknesses planted in real runs of reinforcement, tiny ones: the tripwire of each trips, says so, pauses or stops."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rl_runs import go, metrics_of
from tiny_runs import tiny_run

from r1pipe.engine import Engine
from r1pipe.model.moe import gates
from r1pipe.progress import Display
from r1pipe.records import Score, Status
from r1pipe.rl import loop, scoring, stage
from r1pipe.rl.scoring import score_all
from r1pipe.rl.tripwires import WIRES
from r1pipe.rollout import Sampler, SamplingParams
from r1pipe.run import Run

SHORT = ("stage=grpo", "stage.save_every=0", "stage.sampling.max_tokens=8")


def wire(name: str, limit: float | None = None, steps: int = 1) -> list[str]:
    """Overrides: trip at once, where a tiny run is as sick as it gets."""
    return [f"tripwires.wires.{name}.{key}={value}" for key, value in (("limit", limit), ("steps", steps)) if value is not None]


def trips(folder: Path) -> dict[str, int]:
    """Wire -> the first step in which it tripped; the messages are the metrics' and the wire's own."""
    path, found = folder / "tripwires.jsonl", {}
    rows = {row["step"]: row for row in metrics_of(folder)}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        name = line["name"]
        assert f"tripwire/{name}" in rows[line["step"]] and WIRES[name].cause in line["message"]
        found.setdefault(name, line["step"])
    return found


def said(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    return [row["say"] for row in rows if "say" in row]


Score2 = Callable[..., list[dict[str, Score]]]


def judging(value: Callable[[Any, int], Score]) -> Score2:
    """In the place of the rules: accuracy by completion and its number in the step."""

    def score_all(prompts, completions, names, verdicts=None):
        return [{"accuracy": value(one, n)} for n, one in enumerate(completions)]

    return score_all


def even_share(completion: Any, number: int) -> Score:
    return Score(sum(token % 2 == 0 for token in completion.tokens) / len(completion.tokens))


def failing(count: int) -> Score2:
    """The first completions of a step find no verifier; the others are as good as they are."""
    broken = Score(0.0, Status.INFRASTRUCTURE_FAILED, "no sandbox")
    return judging(lambda one, n: broken if n < count else even_share(one, n))


# --- sicknesses of a run's own making: a learning rate that destroys the policy


def test_a_learning_rate_that_destroys_the_policy(tmp_path, monkeypatch):
    """It leaves its reference behind, says one thing alone, and nothing is left to learn from."""
    monkeypatch.setattr(scoring, "score_all", judging(even_share))
    folder = tiny_run(
        tmp_path / "run",
        *(*SHORT, "stage.max_steps=6", "stage.optim.lr=1.0", "stage.optim.grad_clip=1.0", "stage.kl_coef=0.001"),
        *(*wire("entropy"), *wire("repetition"), *wire("no_variance"), *wire("kl"), "stage.rewards.unfinished=0"),
    )
    go(folder)
    print(trips(folder), [(r.get("entropy"), r.get("kl"), r.get("completions/repetition"), r.get("frac_reward_zero_std"), r.get("router/max_vio"), r.get("sampling/sampling_logp_difference/mean")) for r in metrics_of(folder)])
    assert trips(folder).keys() >= {"entropy", "repetition", "no_variance", "kl"}
