"""Custom rewards by name: functions in worker processes (plugins.py), and servers (remote.py).

Both give each completion of a prompt a score, or None where they have no rule for the prompt.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from r1pipe.config import RewardsConfig
from r1pipe.config.rl import custom_rewards_of
from r1pipe.core.redaction import without_secrets
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.rewards.plugins import PluginPool
from r1pipe.rewards.remote import RemoteReward
from r1pipe.rewards.reply import Patience
from r1pipe.runs import heartbeat

LEAST_LOST = 8  # verdicts that a batch may always lose

Ask = Callable[[Prompt, Sequence[Completion], Patience], list[Score | None]]


class CustomRewards:
    """The rewards of a stage that are no rules of r1pipe's."""

    def __init__(self, config: RewardsConfig, parts: int = 1):
        """Reads the files, but runs nothing. Raises ConfigError as custom_rewards.find does.

        `parts`: batches, of all ranks together, in each of which `score` is called once in a step.
        """
        self.rewards = custom_rewards_of(config)
        self.names = [reward.name for reward in self.rewards]
        self.config, self.parts = config, parts
        functions = [reward for reward in self.rewards if reward.kind != "remote"]
        self._pool = PluginPool(functions, config.plugin_limits) if functions else None
        self._servers = {
            reward.name: RemoteReward(reward.location, config.remote_limits)
            for reward in self.rewards
            if reward.kind == "remote"
        }

    def load(self) -> None:
        """Run the files in a first process. Raises EnvironmentProblem where one does not work."""
        if self._pool:
            with heartbeat.limited():
                self._pool.groups()

    def score(
        self, name: str, groups: Sequence[tuple[Prompt, Sequence[Completion]]]
    ) -> list[list[Score | None]]:
        """The scores of each group's completions. Raises EnvironmentProblem as `load` does.

        Where more is lost than stage.rewards.max_failed allows in the whole step, the rest is not asked.
        """
        total = sum(len(completions) for _, completions in groups)
        patience = Patience(max(LEAST_LOST, self.config.max_failed * total * self.parts))
        threads, size = self.config.remote_limits.connections, 0
        ask: Ask
        if name in self._servers:
            ask = self._servers[name].ask
        else:
            assert self._pool
            self.load()
            ask, threads = partial(self._pool.ask, name), self.config.plugin_limits.workers
            if name not in self._pool.groups():
                size = 1 + total // (4 * threads)  # spreads few large groups over the processes
        pieces = [
            (number, prompt, completions[first : first + (size or len(completions))])
            for number, (prompt, completions) in enumerate(groups)
            for first in range(0, len(completions), size or len(completions))
        ]
        scores: list[list[Score | None]] = [[] for _ in groups]
        with heartbeat.limited(), ThreadPoolExecutor(threads) as executor:
            found = executor.map(lambda piece: ask(piece[1], piece[2], patience), pieces)
            for (number, *_), values in zip(pieces, found, strict=True):
                scores[number] += map(_publishable, values)
        return scores

    def close(self) -> None:
        """End the processes; they end with this one, too."""
        if self._pool:
            self._pool.close()


def _publishable(score: Score | None) -> Score | None:
    """Without secrets of the environment: an API likes to say which key it refuses."""
    return replace(score, detail=without_secrets(score.detail)) if score and score.detail else score
