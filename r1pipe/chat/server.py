"""A server that answers prompts, in OpenAI's protocol: `r1pipe serve`, vLLM, SGLang, or a provider's."""

import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from r1pipe.chat.answerer import AnswerParams, Identity, Progress, Spent
from r1pipe.chat.template import compose_response
from r1pipe.config import AnswererConfig
from r1pipe.core import http
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Completion, Message, Prompt
from r1pipe.runs import heartbeat, stopping

REPLY_LIMIT = 1 << 26  # bytes
BACKOFF_S = 1.0  # before the second try; twice as long before each further one
SEEDS = 2**31  # servers take 32 bits


class ServerAnswerer:
    """The Answerer that is a server. Its completions have no tokens: it has a tokenizer of its own."""

    def __init__(self, key: str, url: str, config: AnswererConfig):
        """`key` is what the user wrote the `url` to. Raises EnvironmentProblem where no server answers."""
        self.key, self.config = key, config
        self.url = url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"
        self.spent, self._lock = Spent(), threading.Lock()
        served = [str(model.get("id")) for model in self._listed()]
        self.model = config.served_name or next(iter(served), "")
        if self.model not in served:
            raise EnvironmentProblem(
                f"{key}={url} serves {', '.join(served) or 'no model'} and not {self.model or 'any'}; "
                "choose one with served_name"
            )
        self.identity = Identity("server", f"{self.url} {self.model}", self.model, config.licence or "")

    def answer(
        self, prompts: Sequence[Prompt], params: AnswerParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """As Answerer's. Raises Stopped on a request to stop; answers under way are then lost."""
        answers: list[list[Completion]] = [[] for _ in prompts]
        began, total = time.monotonic(), len(prompts) * params.n
        pool = ThreadPoolExecutor(self.config.parallel)
        try:
            futures = {pool.submit(self._answers, i, prompt, params): i for i, prompt in enumerate(prompts)}
            waiting: set[Future[list[Completion]]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                heartbeat.tick()
                if stopping.requested():
                    raise stopping.Stopped
                for future in done:
                    answers[futures[future]] = future.result()
                if progress and done:
                    progress(sum(map(len, answers)), total)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.spent.seconds += time.monotonic() - began
        return answers

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
        reply = self._ask("/chat/completions", body)
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

    def _listed(self) -> list[dict[str, Any]]:
        listed = self._ask("/models", None).get("data")
        if not isinstance(listed, list):
            raise EnvironmentProblem(f"{self.key}: {self.url}/models lists no models; is it a chat server?")
        return [model for model in listed if isinstance(model, dict)]

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

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The reply, a JSON object. Raises EnvironmentProblem where there is none after all tries."""
        key = os.environ.get(self.config.key_variable)
        why = ""
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                content = http.request(f"{self.url}{path}", body, key, self.config.timeout_s, REPLY_LIMIT)
                reply = json.loads(content)
                if isinstance(reply, dict):
                    return reply
                why = "no JSON object"
            except (OSError, HTTPException) as error:
                why = http.reason(error)
                if isinstance(error, HTTPError) and not http.may_recover(error):
                    break
            except (ValueError, RecursionError) as error:
                why = f"no JSON ({error})"
        if key:
            why = why.replace(key.strip(), "***")
        raise EnvironmentProblem(
            f"{self.key}: {self.url}{path} fails ({why}; {attempt + 1} requests); see that the server runs, "
            f"with its key in ${self.config.key_variable} if it wants one, and run the same command again"
        )


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
