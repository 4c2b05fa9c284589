"""Rollouts, objectives and scored groups for tests, and RL runs in a test's own process."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from faults.same import timed
from tiny_runs import tiny_config

from r1pipe.config import RLConfig
from r1pipe.core.types import Completion, Group, Prompt
from r1pipe.runs import checkpoints
from r1pipe.train.rl.batch import Rollout
from r1pipe.train.rl.scoring import RewardModels, score_groups
from r1pipe.train.rl.stage import run_rl_stage
from r1pipe.train.run import open_run


@cache
def grpo() -> RLConfig:
    return tiny_config("stage=grpo").stage


def objective(**knobs) -> RLConfig:
    """GRPO's loss, with a clip of 0.2 and without a KL."""
    plain = {"ratio": "token", "surrogate": "clipped", "clip": 0.2, "clip_high": 0.2, "kl_estimator": "k3"}
    return replace(grpo(), **{**plain, "kl_coef": 0.0, **knobs})


def rollout_of(
    prompt: list[int], tokens: list[int], logprobs: list[float], advantage: float = 0.0, scored: bool = True
) -> Rollout:
    return Rollout(prompt, Completion(tokens, logprobs, "stop"), advantage, scored)


def scored_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    weights: Mapping[str, float],
    reward_models: RewardModels | None = None,
    normalise_std: bool = True,
    kls: Sequence[float] | None = None,
    trained_per_group: int | None = None,
) -> list[Group]:
    """Groups of equal size, scored with `max_tokens=100` and without a truncation penalty."""
    size = len(completions) // len(prompts)
    groups = [Group(prompt, [*completions[i * size :][:size]]) for i, prompt in enumerate(prompts)]
    rewards = replace(grpo().rewards, truncation_penalty=0.0)
    sampling = replace(grpo().sampling, max_tokens=100)
    knobs = {"normalise_std": normalise_std, "trained_per_group": trained_per_group}
    config = replace(grpo(), **knobs, rewards=rewards, sampling=sampling)
    score_groups(groups, config, weights, reward_models or {}, kls)
    return groups


def go(folder: Path) -> None:
    with open_run(folder, RLConfig) as run:
        run_rl_stage(run)


def go_killed_and_resumed(folder: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed as it finishes a checkpoint, and again to its end."""
    finish = checkpoints.finish

    def killed(target: Path, *rest: Any) -> None:
        if target.name == checkpoint:
            raise KeyboardInterrupt
        finish(target, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "finish", killed)
        go(folder)
    assert not (folder / "record.json").exists()
    go(folder)


def metrics_of(folder: Path) -> list[dict]:
    """Without what is a matter of time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not timed(key)} for row in rows]
