"""OpenAI's requests, checked: what a client may ask for, and what is refused with which status.

https://platform.openai.com/docs/api-reference; `return_tokens_as_token_ids` and token ids as prompts are as
vLLM has them, `reasoning_content` as DeepSeek's server has it. A field that would change the answer and is
not supported is refused, unless it has the value that changes nothing.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from r1pipe.chat.template import Chat
from r1pipe.config.fields import Count, Positive, Strict, build
from r1pipe.config.serving import ServeConfig
from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.types import Message, Prompt
from r1pipe.serve.request import Request
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.standalone import DrawingDefaults

UNUSED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL: dict[str, tuple[Any, ...]] = {  # unsupported field -> the values that ask for nothing
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "top_k": (None, 0, -1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "add_special_tokens": (None, False),
    "ignore_eos": (None, False),
    "skip_special_tokens": (None, True),
}
LOWEST_TEMPERATURE = 0.01  # but 0: logits over less than that are no numbers
NEW_SEED_BITS = 63
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions

UNIONS = {  # fields of several types, and what they must be
    "stop": "must be text or a list of texts",
    "prompt": "must be text or token ids, or a list of either",
}


class Refused(Exception):
    """A request that is not answered: status of HTTP, OpenAI's code, and the field that is wrong."""

    def __init__(self, status: int, message: str, code: str = "invalid_request", param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


@dataclass
class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool = False  # a last chunk tells the tokens


@dataclass
class Common(Strict):
    """What chat and completions share."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Positive | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = None  # tokens of logprobs are written token_id:NUMBER


@dataclass
class ChatBody(Common):
    """Of /v1/chat/completions."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None


@dataclass
class CompletionBody(Common):
    """Of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    logprobs: Count | None = None
    echo: bool | None = None


@dataclass(frozen=True)
class Asked:
    """A request, and how its answers are told."""

    request: Request
    kind: Literal["chat", "completion"]
    stop: Sequence[str]
    stream: bool
    include_usage: bool
    echo: bool
    tokens_as_ids: bool


@dataclass(frozen=True)
class Reader:
    """Makes requests of JSON bodies."""

    name: str  # of the model
    chat: Chat
    longest: int  # tokens of prompt and answer together
    vocabulary: int
    defaults: DrawingDefaults
    limits: ServeConfig
    created: int  # seconds since 1970

    def of_chat(self, body: Any) -> Asked:
        """Raises Refused."""
        asked = self._checked(ChatBody, body)
        try:
            tokens = self.chat.prompt_tokens(_prompt(asked.messages))
        except DataError as error:
            raise Refused(400, str(error), param="messages") from None
        if asked.top_logprobs and not asked.logprobs:
            raise Refused(422, "top_logprobs needs logprobs=true", param="top_logprobs")
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        given = [asked.max_completion_tokens, asked.max_tokens]
        most = next((value for value in given if value is not None), self.longest)
        return self._asked("chat", asked, [tokens], most, top, False)

    def of_completion(self, body: Any) -> Asked:
        """Raises Refused."""
        asked = self._checked(CompletionBody, body)
        echo = bool(asked.echo)
        if echo and asked.stream:
            raise Refused(400, "echo is not streamed; leave one of them out", param="echo")
        prompts = [self._tokens(prompt) for prompt in _prompts(asked.prompt)]
        most = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        return self._asked("completion", asked, prompts, most, asked.logprobs, echo)

    def _checked(self, kind: Any, body: Any) -> Any:
        """The body as a dataclass of the kind."""
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        fields = {key: value for key, value in body.items() if key not in UNUSED}
        for key in NEUTRAL.keys() & fields.keys():
            value = fields.pop(key)
            if not any(_same(value, neutral) for neutral in NEUTRAL[key]):
                raise Refused(400, f"{key} is not supported; leave it out", "unsupported", key)
        for key in fields.keys() - kind.__dataclass_fields__.keys():
            raise Refused(400, f"{str(key)[:80]} is no field of this request", "unknown_field", str(key)[:80])
        try:
            asked: Common = build(kind, fields)
        except ConfigError as error:
            key = re.split(r"[.=]", str(error))[0]
            raise Refused(422, f"{key} {UNIONS[key]}" if key in UNIONS else str(error), param=key) from None
        if asked.model not in (None, self.name):
            message = f"there is no model {str(asked.model)[:200]}; this server has {self.name}"
            raise Refused(404, message, "model_not_found", "model")
        self._check_ranges(asked)
        return asked

    def _check_ranges(self, asked: Common) -> None:
        limits, stop = self.limits, asked.stop or []
        top = asked.logprobs if isinstance(asked, CompletionBody) else getattr(asked, "top_logprobs", 0)
        if (asked.n or 1) > limits.max_n:
            raise Refused(422, f"n={asked.n} must be at most {limits.max_n} (serve.max_n)", param="n")
        if isinstance(stop, list) and len(stop) > limits.max_stop:
            raise Refused(422, f"stop may have {limits.max_stop} strings (serve.max_stop)", param="stop")
        if (top or 0) > limits.max_top_logprobs:
            most = f"{limits.max_top_logprobs} (serve.max_top_logprobs)"
            raise Refused(
                422, f"{top} alternatives of each token are asked for; at most {most}", param="logprobs"
            )
        if 0 < (asked.temperature or 0) < LOWEST_TEMPERATURE:
            message = f"temperature={asked.temperature} must be 0 or at least {LOWEST_TEMPERATURE}"
            raise Refused(422, message, param="temperature")

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            prompt = self.chat.encode(prompt)
        if not prompt:
            raise Refused(400, "a prompt is empty; give at least one token", param="prompt")
        if not all(0 <= token < self.vocabulary for token in prompt):
            raise Refused(400, f"a token of a prompt is not below {self.vocabulary}", param="prompt")
        return prompt

    def _asked(
        self, kind: Literal["chat", "completion"], asked: Common, prompts: list[list[int]],
        most: int, top: int | None, echo: bool,
    ) -> Asked:  # fmt: skip
        n, limits = asked.n or 1, []
        if most == 0 and not echo:
            raise Refused(422, "max_tokens=0 draws nothing; give 1 or more", param="max_tokens")
        if n * len(prompts) > self.limits.max_waiting:
            most_answers = f"at most {self.limits.max_waiting} (serve.max_waiting)"
            message = f"{n * len(prompts)} answers are asked for; {most_answers}"
            raise Refused(422, message, param="n")
        for prompt in prompts:
            room = self.longest - len(prompt)
            if room < min(1, most):
                message = (
                    f"a prompt has {len(prompt)} tokens, and the model reads {self.longest} with its answer"
                )
                raise Refused(400, f"{message}; shorten it", "context_length_exceeded", "prompt")
            limits.append(min(room, most))
        draws = SamplingParams(
            max_tokens=max(1, *limits),
            temperature=self.defaults.temperature if asked.temperature is None else asked.temperature,
            top_p=self.defaults.top_p if asked.top_p is None else asked.top_p,
            n=n,
            seed=secrets.randbits(NEW_SEED_BITS) if asked.seed is None else asked.seed % 2**64,
        )
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        request = Request(prompts, limits, draws, top, read_prompts=echo and top is not None)
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        ids = bool(asked.return_tokens_as_token_ids)
        return Asked(
            request, kind, [string for string in stop if string], bool(asked.stream), usage, echo, ids
        )


def _same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are equal: true is not 1, but 0.0 is 0."""
    return (type(value) is bool) == (type(other) is bool) and value == other


def _prompts(given: str | list[str] | list[int] | list[list[int]] | None) -> list[Any]:
    """One prompt or several: texts or token ids."""
    if given is None or given == []:
        raise Refused(422, "prompt is missing", param="prompt")
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _prompt(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """A conversation that ends with the user's turn."""
    turns = [_message(message, place) for place, message in enumerate(messages)]
    if not turns or turns[-1].role != "user":
        raise Refused(400, "messages must end with one of the user", param="messages")
    return Prompt("", "", "", turns[-1].content, context=tuple(turns[:-1]))


def _message(message: Mapping[str, Any], place: int) -> Message:
    role, content, where = message.get("role"), message.get("content"), f"messages[{place}]"
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise Refused(
            422, f"{where}.role is none of system, developer, user, assistant, tool", param="messages"
        )
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        parts = [text for text in texts if isinstance(text, str)]
        if len(parts) < len(texts):
            raise Refused(400, f"{where}.content has a part that is no text", param="messages")
        content = "".join(parts)
    if not isinstance(content, str):
        raise Refused(422, f"{where}.content must be text", param="messages")
    return Message(role, content)
