"""A server that answers prompts, in OpenAI's protocol: `r1pipe serve`, vLLM, SGLang, or a provider's."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from typing import Any

from r1pipe.chat.answerer import AnswerParams, Identity, Progress, Spent
from r1pipe.chat.template import compose_response
from r1pipe.config import AnswererConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Completion, Message, Prompt
from r1pipe.runs import heartbeat, stopping
from r1pipe.runs.servers import base_url, request, served_model

SEEDS = 2**31  # servers take 32 bits
QUEUED = 2  # times `parallel` prompts wait or are asked, so that a reply is followed by a request at once


class ServerAnswerer:
    """The Answerer that is a server. Its completions have no tokens: it has a tokenizer of its own."""

    def __init__(self, key: str, url: str, config: AnswererConfig):
        """`key` is what the user wrote the `url` to. Raises EnvironmentProblem where no server answers."""
        self.key, self.config, self.url = key, config, base_url(url)
        self.spent, self._lock = Spent(), threading.Lock()
        self.model = served_model(key, url, config)
        self.identity = Identity("server", f"{self.url} {self.model}", self.model, config.licence or "")

    def answer(
        self, prompts: Sequence[Prompt], params: AnswerParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """As Answerer's. Raises Stopped on a request to stop; answers under way are then lost."""
        answers: list[list[Completion]] = [[] for _ in prompts]
        done = 0
        for i, found in self.as_they_come([*enumerate(prompts)], params):
            answers[i], done = found, done + len(found)
            if progress:
                progress(done, len(prompts) * params.n)
        return answers

    def as_they_come(
        self, prompts: Iterable[tuple[int, Prompt]], params: AnswerParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(i, answers) of each (i, prompt) as soon as they are there; `parallel` requests are under way until
        the last prompt. After a failure nothing more is asked, and the answers under way still come.

        Raises EnvironmentProblem where the server is lost, and Stopped on a request to stop.
        """
        left, parallel = iter(prompts), self.config.parallel
        waiting: dict[Future[list[Completion]], int] = {}
        pool, failure, began = ThreadPoolExecutor(parallel), None, time.monotonic()
        try:
            while True:
                for i, prompt in islice(left, 0 if failure else QUEUED * parallel - len(waiting)):
                    waiting[pool.submit(self._answers, i, prompt, params)] = i
                if not waiting:
                    break
                done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                heartbeat.tick()
                self.spent.seconds, began = self.spent.seconds + time.monotonic() - began, time.monotonic()
                for future in done:
                    if problem := future.exception():
                        failure = failure or problem
                        waiting.pop(future)
                    else:
                        yield waiting.pop(future), future.result()
                if stopping.requested():
                    raise stopping.Stopped
                if failure:
                    waiting = {future: i for future, i in waiting.items() if not future.cancel()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failure:
            raise failure

    def close(self) -> None:
        """Nothing is held."""

    def complete(self, conversation: Sequence[Message], params: AnswerParams, **more: Any) -> dict[str, Any]:
        """A reply of the server as it is; `more`: fields of the request that AnswerParams does not have."""
        body = {
            "model": self.model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in conversation],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "n": params.n,
            "seed": params.seed % SEEDS,
            **({"logprobs": True, "top_logprobs": params.top_logprobs} if params.top_logprobs else {}),
            **more,
        }
        reply = request(self.key, self.url, "/chat/completions", body, self.config)
        self._count(reply.get("usage"))
        return reply

    def _answers(self, number: int, prompt: Prompt, params: AnswerParams) -> list[Completion]:
        """n answers; a server that gives fewer at a time is asked again."""
        conversation = [*prompt.context, Message("user", prompt.question)]
        answers: list[Completion] = []
        while len(answers) < params.n:
            seed = params.seed + (params.first + number * params.stride) * params.n + len(answers)
            of_request = replace(params, n=params.n - len(answers), seed=seed)
            choices = self.complete(conversation, of_request).get("choices")
            if not isinstance(choices, list) or not choices:
                raise EnvironmentProblem(f"{self.key}: {self.url} answers no choices; is it a chat server?")
            answers += [_completion(choice) for choice in choices]
        return answers[: params.n]

    def _count(self, usage: Any) -> None:
        used = usage if isinstance(usage, dict) else {}
        read, drawn = (int(used.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion"))
        price = self.config
        with self._lock:
            self.spent.requests += 1
            self.spent.prompt_tokens += read
            self.spent.completion_tokens += drawn
            cost = (
                read * price.usd_per_million_prompt_tokens + drawn * price.usd_per_million_completion_tokens
            )
            self.spent.usd += cost / 1e6


def _completion(choice: Any) -> Completion:
    """A choice of a reply; what a filter or a limit has cut off counts as truncated."""
    message = choice.get("message") if isinstance(choice, dict) else None
    message = message if isinstance(message, dict) else {}
    content = str(message.get("content") or "")
    thought = message.get("reasoning_content") or message.get("reasoning")
    text = compose_response(thought.strip(), content.strip()) if isinstance(thought, str) else content
    finish = "stop" if choice.get("finish_reason") == "stop" else "length"
    return Completion([], [], finish, text, likely=_likely(choice))


def _likely(choice: Any) -> list[tuple[bytes, list[tuple[bytes, float]]]] | None:
    """The log-probabilities in a choice; None where they are missing or of another form."""
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        return None
    try:
        return [
            (
                _bytes_of(token),
                [(_bytes_of(other), float(other["logprob"])) for other in token["top_logprobs"]],
            )
            for token in content
        ]
    except (KeyError, TypeError, ValueError):
        return None


def _bytes_of(token: Any) -> bytes:
    """A token's bytes, which may be part of a character; servers that do not tell them have its text."""
    return bytes(token["bytes"]) if token.get("bytes") is not None else str(token["token"]).encode()
