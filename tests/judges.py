"""Fake judges with known biases: Answerers with an opinion in place of a model."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from r1pipe.chat.answerer import AnswerParams, Identity, Progress, Spent
from r1pipe.config.compose import compose
from r1pipe.config.judge import JudgeConfig
from r1pipe.core.types import Completion, Prompt

Opinion = Callable[[str, str, random.Random], float]  # of answers A and B: above 0 for A


@cache
def usual() -> JudgeConfig:
    return compose(["stage=base", "judge=http://localhost:1/v1"]).config.stage.judge


def judge_config(**changed: object) -> JudgeConfig:
    return replace(usual(), **changed)


def quoted(prompt: Prompt, name: str) -> str:
    """The text that the prompt quotes under this name."""
    found = re.search(rf"<{name}(?: \w+)?>\n(.*?)\n</{name}", prompt.question, re.DOTALL)
    assert found, prompt.question
    return found[1]


class FakeJudge:
    """Compares by an opinion, and rates by one with the empty answer."""

    def __init__(self, opinion: Opinion, name: str = "fake"):
        self.opinion, self.identity, self.spent = opinion, Identity("server", name, "1", ""), Spent()
        self.asked: list[Prompt] = []

    def answer(
        self, prompts: Sequence[Prompt], params: AnswerParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.asked += prompts
        self.spent.requests += len(prompts)
        self.spent.usd += 0.5 * len(prompts)
        return [
            [Completion([], [], "stop", self.say(prompt, f"{params.seed}/{n}")) for n in range(params.n)]
            for prompt in prompts
        ]

    def say(self, prompt: Prompt, draw: str) -> str:
        rng = random.Random(f"{prompt.question}/{draw}")
        if prompt.id.startswith("pairwise"):
            value = self.opinion(quoted(prompt, "answer A"), quoted(prompt, "answer B"), rng)
            label = "A>B" if value > 0 else "B>A" if value < 0 else "A=B"
        else:
            value = self.opinion(quoted(prompt, "answer"), "", rng)
            label = {"pointwise": "9" if value > 0 else "2", "harmless": "5" if value > 0 else "1"}.get(
                prompt.id.partition("-")[0], "CORRECT" if value > 0 else "INCORRECT"
            )
        return f"<think>\nHm.\n</think>\n\nI have looked at it.\n[[{label}]]"

    def close(self) -> None:
        pass


def first(a: str, b: str, rng: random.Random) -> float:
    return 1.0


def longer(a: str, b: str, rng: random.Random) -> float:
    return float(len(a) - len(b))


def coin(a: str, b: str, rng: random.Random) -> float:
    return rng.choice([-1.0, 1.0])
