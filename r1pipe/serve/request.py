"""A request to the engine, and what it is told."""

from dataclasses import dataclass, field
from queue import SimpleQueue

from r1pipe.model.likelihood import Likelihood
from r1pipe.train.rollout import SamplingParams

Alternatives = tuple[list[int], list[float]]  # the likeliest tokens in a place, and their log-probabilities


class Busy(Exception):
    """Too many answers are waiting."""


class Closing(Exception):
    """The server is about to end, and takes nothing new."""


@dataclass(frozen=True)
class News:
    """What an answer has got since the last time."""

    answer: int  # its number in the request: prompt * n + sample
    tokens: list[int]
    logprobs: list[float]  # of the tokens, under softmax(logits); only where the request wants them
    alternatives: list[Alternatives]  # of the tokens, likewise
    finish_reason: str | None  # "stop" or "length" with the last news of an answer


@dataclass(frozen=True)
class PromptRead:
    """How likely the tokens of a prompt are."""

    prompt: int
    likelihood: Likelihood


@dataclass(frozen=True)
class Failed:
    """A request that ends without its answers."""

    message: str
    status: int  # of HTTP


@dataclass(eq=False)
class Request:
    """Answers to some prompts, drawn in the same way."""

    prompts: list[list[int]]
    limits: list[int]  # tokens of each prompt's answers at most; 0: none is drawn
    params: SamplingParams  # max_tokens: the largest of the limits, or 1
    top: int | None = None  # alternatives of each token to tell; None: no log-probabilities
    read_prompts: bool = False  # tell log-probabilities of the prompts, too
    news: "SimpleQueue[News | PromptRead | Failed]" = field(default_factory=SimpleQueue)
    dropped: frozenset[int] = frozenset()  # answers that nobody wants any more
    prompts_told: set[int] = field(default_factory=set)
    over: bool = False  # nobody wants anything more

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.params.n

    def fail(self, message: str, status: int) -> None:
        """End it without its answers."""
        self.over = True
        self.news.put(Failed(message, status))

    def left(self) -> int:
        """How many PromptReads and last News of answers are to come, of a new request."""
        drawn = sum(self.params.n for limit in self.limits if limit)
        return drawn + (len(self.prompts) if self.read_prompts else 0)
