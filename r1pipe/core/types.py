"""The nouns that flow through the pipeline: Prompt -> Completion -> Score -> Group, and Example.

Plain data, no torch: both wings may import this file. Suffixes: `tokens` are lists of token ids.
"""

from dataclasses import dataclass, field
from enum import StrEnum

HELPFUL_TASKS = ("writing", "facts", "identity", "translation")  # of general prompts, judged by helpfulness
GENERAL_TASKS = (*HELPFUL_TASKS, "safety")  # no rule can verify an answer to these


@dataclass(frozen=True)
class Prompt:
    """One question put to the model, with all that is needed to judge an answer.

    Sample: Prompt(id="countdown-3f9a…", task="countdown", language="en", question="Use 5, 9 …",
    answer="16", checker={"numbers": [5, 9, 14]})
    """

    id: str  # stable across runs: task and a hash of language and question
    task: str  # countdown | word | program | gsm8k … | writing | facts | identity | translation | safety
    language: str  # "en" or "zh": the language that the reasoning and the summary must be in
    question: str
    answer: str = ""  # gold answer, as text; empty where a checker or the hidden truth judges
    checker: dict = field(default_factory=dict)  # what the task's checker needs (numbers, tests, reference …)
    level: int = 0  # difficulty, where the task has levels


@dataclass
class Completion:
    """What a sampler made of one prompt."""

    tokens: list[int]  # sampled ids, the end-of-sequence token included when finish_reason is "stop"
    # of each token under softmax(logits / temperature), before top_p cuts; greedy: under softmax(logits)
    logprobs: list[float]
    finish_reason: str  # "stop" (EOS) or "length" (cut off)
    text: str = ""  # decoded without EOS; `<think>` and `</think>` are kept as text

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Status(StrEnum):
    """A reward's outcome: only SCORED values may train."""

    SCORED = "scored"
    VERIFIER_FAILED = "verifier_failed"
    INFRASTRUCTURE_FAILED = "infrastructure_failed"


@dataclass(frozen=True)
class Score:
    """The verdict of one reward on one completion; `value` means nothing unless status is SCORED."""

    value: float
    status: Status = Status.SCORED
    detail: str = ""


@dataclass
class Group:
    """One prompt with its G completions and what they earned (GRPO's unit)."""

    prompt: Prompt
    completions: list[Completion]
    scores: list[dict[str, Score]] = field(default_factory=list)  # per completion: reward name -> Score
    rewards: list[float] = field(default_factory=list)  # weighted sums; NaN where a score failed
    advantages: list[float] = field(default_factory=list)
    trained: bool = True  # false: dynamic sampling has passed it over
    place: int = 0  # among all that the ranks have drawn for the step
    prompt_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a written response: what SFT trains on."""

    prompt: Prompt
    response: str  # text after the assistant token, without EOS
    strategy: str = ""  # how a worked solution goes about it, where the generator knows
    source: str = ""  # provenance: "world", "sampled:<run id>", a file and line …


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
    """A training sequence: `loss[i]` says whether token i is learned (response tokens and EOS)."""

    tokens: list[int]
    loss: list[bool]
