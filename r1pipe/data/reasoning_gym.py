"""Tasks of reasoning-gym by name: generated problems, each with the checker of its own task.

Sample: data=reasoning_gym data.tasks=[chain_sum] gives Prompt(task="chain_sum", answer="7",
question="State the final answer to the following arithmetic problem: 4 + 3 =",
checker={"reasoning_gym": "chain_sum", "entry": {...}}).
"""

import hashlib
import importlib.metadata
import json
import random
from dataclasses import asdict, replace

from r1pipe.config import DataConfig
from r1pipe.core.errors import ConfigError
from r1pipe.core.types import Prompt
from r1pipe.data.source import Source
from r1pipe.data.world.content import make_prompt, split_of
from r1pipe.rewards import gym
from r1pipe.runs.data_files import NOT_READ

TRIES = 400  # problems generated per problem requested, before the tasks count as exhausted


class ReasoningGym(Source):
    """The source of `data.kind=reasoning_gym`: problems only, no solutions, no general data."""

    def __init__(self, config: DataConfig):
        if not config.tasks:
            raise ConfigError("data.tasks is empty; name tasks of reasoning-gym, e.g. data.tasks=[chain_sum]")
        self.config = config
        self.files: dict[str, str] = {}
        for task in config.tasks:
            gym.dataset(task)
        version = importlib.metadata.version("reasoning-gym")
        read = {key: value for key, value in asdict(config).items() if key not in NOT_READ}
        self.hash = hashlib.sha256(json.dumps([read, version], sort_keys=True).encode()).hexdigest()

    def prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """Up to n distinct problems, the tasks in turn; fewer where the tasks have no more.

        The hash of the question decides its split, so that a question is never in two.
        """
        start = random.Random(f"{seed}/{split}").randrange(gym.CHUNKS) * gym.CHUNK
        found: dict[str, Prompt] = {}
        for turn in range(TRIES * n):
            if len(found) == n:
                break
            index, task = divmod(turn, len(self.config.tasks))
            prompt = _prompt(self.config.tasks[task], start + index)
            if split_of(prompt.question) == split:
                found.setdefault(prompt.id, replace(prompt, licence=self.config.licence))
        return list(found.values())


def _prompt(task: str, index: int) -> Prompt:
    chunk, offset = divmod(index, gym.CHUNK)
    entry = gym.dataset(task, chunk)[offset]
    question, answer = entry["question"], str(entry["answer"])
    prompt = make_prompt(task, "en", question, answer, {"reasoning_gym": task, "entry": entry})
    return replace(prompt, source=f"reasoning_gym:{task}:{index}")
