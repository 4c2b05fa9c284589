"""Custom rewards for tests: their config, and what they score."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rl_runs import grpo

from r1pipe.config import PluginLimits, RemoteLimits, RewardsConfig
from r1pipe.core.types import Completion, Message, Prompt, Score
from r1pipe.rewards.custom import CustomRewards

PROMPT = Prompt("p", "word", "en", "2+2?", "4", {"pair": (1, 2)}, 3, (Message("system", "Be brief."),))
LIMITS = PluginLimits(workers=1, cpu_s=0.5, sleep_s=2.0, memory_gb=1.0)
REMOTE_LIMITS = RemoteLimits(connections=2, timeout_s=10.0, retries=2)


def completions(*texts: str) -> list[Completion]:
    return [Completion([7] * len(text), [0.0] * len(text), "stop", text) for text in texts]


def rewards_config(names: Sequence[str], **changed: Any) -> RewardsConfig:
    """With a weight of 1 for each name."""
    config = replace(grpo().rewards, plugin_limits=LIMITS, remote_limits=REMOTE_LIMITS, max_failed=0.5)
    return replace(config, weights={"accuracy": 1.0, **dict.fromkeys(names, 1.0)}, **changed)


def scores(custom: CustomRewards, *texts: str, name: str = "mine") -> list[Score | None]:
    """Of one group."""
    [found] = custom.score(name, [(PROMPT, completions(*texts))])
    return found
