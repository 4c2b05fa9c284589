"""Whoever answers prompts besides the policy, a teacher or a judge: a checkpoint, or a server."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal, Protocol

from r1pipe.core.types import Completion, Prompt

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class AnswerParams:
    """How answers are drawn."""

    max_tokens: int  # longest answer
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    n: int = 1  # answers per prompt
    seed: int = 0
    max_num_seqs: int = 64  # drawn together by a local model
    # Prompt i is number first + i * stride of all prompts, and that number alone selects its random numbers.
    first: int = 0
    stride: int = 1
    top_logprobs: int = 0  # fill Completion.likely with so many tokens; of a server


@dataclass(frozen=True)
class Identity:
    """Who answers, as it is recorded with every sample."""

    kind: Literal["checkpoint", "server"]  # a Hugging Face folder is a checkpoint, too
    name: str  # run id and step, folder, or URL and model name
    version: str  # the manifest's hash; what a server says it serves
    licence: str  # "" where unknown

    @property
    def name_and_version(self) -> str:
        """As the column `judge` of samples has it."""
        return f"{self.name} {self.version}".strip()


@dataclass
class Spent:
    """What answers have cost so far."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    usd: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class Answerer(Protocol):
    """Answers prompts."""

    identity: Identity
    spent: Spent

    def answer(
        self, prompts: Sequence[Prompt], params: AnswerParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """n completions of each prompt, in order; `text` is filled. Of a server they have no tokens and no
        logprobs. The prompts' contexts are sent, too. Raises EnvironmentProblem where a server is lost."""

    def close(self) -> None:
        """Free what it holds."""
