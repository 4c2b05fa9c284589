"""The pipeline's data types: Prompt -> Completion -> Score -> Group, and Example."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

HELPFUL_TASKS = ("writing", "facts", "identity", "translation")  # of general prompts, scored for helpfulness
GENERAL_TASKS = (*HELPFUL_TASKS, "safety")  # no rule can verify an answer to these
CURATED = "curated"  # the task of a teacher's questions on a topic or a document: nor to these


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # system | developer | user | assistant | tool
    content: str


@dataclass(frozen=True)
class Prompt:
    """A question, with all that is needed to verify an answer.

    Sample: Prompt(id="countdown-3f9a…", task="countdown", language="en", question="Use 5, 9 …",
    answer="16", checker={"numbers": [5, 9, 14]})
    """

    id: str  # task and a hash of language and question: the same in every run
    task: str  # countdown | word | program | gsm8k … | writing | facts | identity | translation | safety
    language: str  # "en" or "zh", required of reasoning and summary
    question: str
    answer: str = ""  # gold answer; "" where a checker verifies
    checker: dict = field(default_factory=dict)  # for the task's checker: numbers, tests, reference …
    level: int = 0  # difficulty, for tasks with levels
    context: tuple[Message, ...] = ()  # what was said before the question: system prompt, earlier turns
    source: str = field(default="", compare=False)  # provenance: "world", a file and line …; "": unknown
    licence: str | None = field(default=None, compare=False)  # of the prompt and its answers; None: unknown
    subject: str = ""  # of a benchmark that has subjects


@dataclass
class Completion:
    """A sampled answer to a prompt."""

    tokens: list[int]  # sampled ids, with EOS if finish_reason is "stop"
    # of each token under softmax(logits / temperature), before top_p; greedy: under softmax(logits)
    logprobs: list[float]
    finish_reason: str  # "stop" (EOS) or "length" (truncated)
    text: str = ""  # decoded without EOS; includes <think> and </think>
    # (tokens, version of the weights that drew them) of each span, in order; empty: not recorded
    versions: tuple[tuple[int, int], ...] = ()
    # [tokens, MoE layers, K]: the experts that the sampler's router chose; None: not recorded. Row t
    # is of the token that was read to draw token t: the prompt's last one, then the completion but its last
    experts: "np.ndarray | None" = None
    # of a server that was asked for them: each token's bytes, and the likeliest tokens in its place with
    # their log-probabilities; None: not recorded
    likely: "list[tuple[bytes, list[tuple[bytes, float]]]] | None" = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Status(StrEnum):
    """A reward's outcome: only SCORED values are trained on."""

    SCORED = "scored"
    VERIFIER_FAILED = "verifier_failed"
    INFRASTRUCTURE_FAILED = "infrastructure_failed"


@dataclass(frozen=True)
class Score:
    """A reward of a completion; `value` is only valid if status is SCORED."""

    value: float
    status: Status = Status.SCORED
    detail: str = ""


@dataclass
class Group:
    """A prompt with its G completions and their rewards (GRPO's unit).

    A rollout Batch makes it with prompt, completions and prompt_tokens, and sample_groups sets place.
    score_groups sets scores, rewards, kept and advantages; in PPO, Critic.estimate adds the score `kl` and
    replaces the advantages. redistribute_groups sets trained.
    """

    prompt: Prompt
    completions: list[Completion]
    scores: list[dict[str, Score]] = field(default_factory=list)  # per completion: reward name -> Score
    rewards: list[float] = field(default_factory=list)  # weighted sums; NaN where a score failed
    advantages: list[float] = field(default_factory=list)
    trained: bool = True  # false: dynamic sampling has passed it over
    kept: list[int] | None = None  # the completions that are trained on; None: all
    place: int = 0  # among all that the ranks have drawn for the step
    prompt_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a response to imitate, for SFT."""

    prompt: Prompt
    response: str  # text after the assistant token, without EOS
    strategy: str = ""  # the solution method, if the generator knows it
    # provenance, as it is stored (r1pipe.runs.samples): None where unknown, or where there is none
    source: str = ""  # of the response: "world", "sampled:<run id>", "teacher:<name>", a file and line …
    checkpoint_hash: str | None = None  # of the checkpoint that drew it
    seed: str | None = None  # of the draw
    licence: str | None = None
    teacher: str | None = None  # who wrote it
    teacher_version: str | None = None
    judge: str | None = None  # who let it pass
    filters: tuple[str, ...] = ()  # that it passed


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, the first preferred (helpfulness)."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class SafetyLabel:
    """One response with its label (harmlessness, point-wise)."""

    prompt: Prompt
    response: str
    safe: bool


@dataclass
class Example:
    """A training sequence: `loss[i]` is whether token i is a target (response tokens and EOS)."""

    tokens: list[int]
    loss: list[bool]

    @property
    def targets(self) -> list[int]:
        """The tokens that are learned: those of the response, with the one that ends it."""
        return [token for token, is_target in zip(self.tokens, self.loss, strict=True) if is_target]
