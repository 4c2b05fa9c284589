"""Completions from a vLLM server: a request for each, many at a time, each checked as it arrives."""

import base64
import binascii
import hashlib
import io
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from r1pipe.core.errors import NumericProblem
from r1pipe.core.types import Completion
from r1pipe.runs import heartbeat
from r1pipe.runs.stopping import Stopped
from r1pipe.train.rollout.checks import checked_limits, checked_stops
from r1pipe.train.rollout.drawing import SamplingParams
from r1pipe.train.rollout.sampler import Stop
from r1pipe.train.rollout.vllm.client import Client, Gone, Refused

POLL_S = 0.1
LOOK_S = 5.0  # without a completion, after which the server is asked whether it still draws
NO_LOGPROB = -9999.0  # what vLLM says in place of NaN and minus infinity


@dataclass(frozen=True)
class Wanted:
    """One completion to be drawn."""

    prompt: int  # its index
    tokens: list[int]  # the prompt
    params: Mapping[str, Any]  # vLLM's
    experts: bool = False  # with the experts that each token went to


def wanted(
    prompts: Sequence[list[int]],
    params: SamplingParams,
    limits: Sequence[int] | None,
    ends: Collection[int],
    shape: tuple[int, int],
) -> list[Wanted]:
    """n requests for each prompt, in order. `shape`: tokens of the longest sequence, and of the vocabulary.

    What ends a completion is said by token, so that vLLM's own idea of it does not matter. Each has a seed of
    its own, which depends on (seed, its prompt's global index, its own index) alone.
    Raises ConfigError if a prompt or a stop token is impossible for the model.
    """
    longest, vocabulary = shape
    stops = checked_stops(vocabulary, params, ends)
    every: dict[str, Any] = {"temperature": params.temperature, "top_p": params.top_p, "detokenize": False}
    every |= {"ignore_eos": True, "stop_token_ids": sorted(stops)}
    if params.top_p == 1:  # vLLM's are those of the nucleus, not of the whole distribution
        every["logprobs"] = 0
    found = []
    each_limit = checked_limits(longest, vocabulary, prompts, params, limits)
    for index, (prompt, limit) in enumerate(zip(prompts, each_limit, strict=True)):
        for sample in range(params.n):
            more: dict[str, Any] = {"max_tokens": limit}
            if params.temperature > 0:
                more["seed"] = _seed(params, index, sample)
            found.append(Wanted(index, prompt, every | more, params.record_experts))
    return found


def _seed(params: SamplingParams, prompt: int, sample: int) -> int:
    name = f"{params.seed}/{params.first + prompt * params.stride}/{sample}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def read(
    choice: Mapping[str, Any], wanted: Wanted, version_of: Callable[[str], int], dense_layers: int = 0
) -> Completion:
    """A completion as vLLM answers it. `version_of` a label of weights may raise Gone.

    Raises Gone where it was broken off, Refused where it is none, and NumericProblem.
    """
    try:
        reason, tokens = choice["finish_reason"], [int(token) for token in choice["token_ids"]]
        if reason not in ("stop", "length") or not tokens:
            raise Gone(f"the server broke a completion off ({reason})")
        spans = [
            (int(span["end"]) - int(span["start"]), version_of(span["version"]))
            for span in choice["weight_versions"]
        ]
        if "logprobs" in wanted.params:
            logprobs = [float(place["logprob"]) for place in choice["logprobs"]["content"]]
        else:
            logprobs = [math.nan] * len(tokens)
        if len(logprobs) != len(tokens) or sum(length for length, _ in spans) != len(tokens):
            raise Refused(
                f"{len(tokens)} tokens came with {len(logprobs)} log-probabilities and spans {spans}"
            )
        routes = choice.get("routed_experts") if wanted.experts else None
        chosen = None if routes is None else experts_of(routes, len(wanted.tokens), len(tokens), dense_layers)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Refused(f"the server answers no completion ({type(error).__name__}: {error})") from None
    if "logprobs" in wanted.params and not all(NO_LOGPROB < logprob <= 1e-3 for logprob in logprobs):
        raise NumericProblem(
            "a drawn token's probability is not finite in the vLLM server; lower stage.optim.lr, or start "
            "from an earlier checkpoint if the weights are damaged; nothing of this step was saved"
        )
    ended = "stop" if tokens[-1] in wanted.params["stop_token_ids"] else "length"
    return Completion(tokens, logprobs, ended, versions=tuple(spans), experts=chosen)


def experts_of(encoded: str, prompt: int, tokens: int, dense_layers: int = 0) -> np.ndarray:
    """vLLM's routes as Completion.experts: base64 of a .npy file [prompt + tokens - 1, layers, K], a row for
    each token that was read; the layers without experts come first.

    Raises ValueError; nothing is unpickled.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"routes are no base64: {error}") from None
    routes = np.load(io.BytesIO(content), allow_pickle=False)
    if routes.ndim != 3 or len(routes) != prompt + tokens - 1 or routes.dtype.kind not in "iu":
        raise ValueError(f"routes of shape {routes.shape} for {prompt} and {tokens} tokens")
    return routes[prompt - 1 :, dense_layers:].astype(np.int16)


class Draw:
    """Requests under way, by threads that each wait for one answer."""

    def __init__(self, client: Client, timeout_s: float, connections: int):
        """`timeout_s`: without any new token, after which the server counts as hanging."""
        self.client, self.timeout_s, self.connections = client, timeout_s, connections
        self._todo: deque[tuple[int, Wanted]] = deque()
        self._done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._over = threading.Event()
        self._generated, self._moved_at, self._looked_at = -1.0, 0.0, 0.0

    def run(self, todo: Sequence[tuple[int, Wanted]], take: Callable[[int, Any], None], stop: Stop) -> None:
        """Ask for all of `todo`; `take` gets each number with its choice, in this thread, and may raise.

        Raises Stopped, Gone (a server that draws no token for `timeout_s`, too) and Refused; requests under
        way are then hung up on, which ends vLLM's work on them.
        """
        self._todo.extend(todo)
        count = min(self.connections, len(todo))
        threads = [threading.Thread(target=self._work, name="draw", daemon=True) for _ in range(count)]
        self._moved_at = self._looked_at = time.monotonic()
        try:
            for thread in threads:
                thread.start()
            for _ in range(len(todo)):
                number, answer = self._next(stop)
                if isinstance(answer, Gone | Refused):
                    raise answer
                take(number, answer)
        finally:
            self._over.set()
            self.client.hang_up()
            for thread in threads:
                thread.join(POLL_S)  # one that still connects ends by itself

    def _next(self, stop: Stop) -> tuple[int, Any]:
        while True:
            if threading.current_thread() is threading.main_thread():
                heartbeat.tick()  # whether the server works is looked after here
            if stop():
                raise Stopped
            try:
                found = self._done.get(timeout=POLL_S)
                self._moved_at = self._looked_at = time.monotonic()
                return found
            except Empty:
                self._look()

    def _look(self) -> None:
        """Raises Gone where the server draws nothing any more."""
        now = time.monotonic()
        if now - self._looked_at < min(LOOK_S, self.timeout_s / 4):
            return
        self._looked_at = now
        try:
            generated = self.client.generated()
        except Gone as error:
            generated, why = self._generated, str(error)
        else:
            why = f"{self.client.url} has drawn no token for {self.timeout_s:g} s (sampler.timeout_s)"
        if generated != self._generated:
            self._generated, self._moved_at = generated, now
        elif now - self._moved_at > self.timeout_s:
            raise Gone(why)

    def _work(self) -> None:
        while not self._over.is_set():
            try:
                number, wanted = self._todo.popleft()
            except IndexError:
                return
            try:
                answer: Any = self.client.generate(wanted.tokens, wanted.params)
            except (Gone, Refused) as error:
                answer = error
            self._done.put((number, answer))
