"""Servers as rewards: a request for each group, tried again where the server or the way to it fails.

    POST {"prompt": {id, task, language, question, answer, checker, level, context},
          "completions": [{"text", "finish_reason", "length"}]}     length: in tokens
    ->   {"scores": [1.0, null, {"value": 0.5, "status": "scored", "detail": "half of the tests"}]}

null: no rule for this prompt. A server that cannot be reached, or refuses the request, is
INFRASTRUCTURE_FAILED; one that answers something else is VERIFIER_FAILED. Neither is a wrong answer.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from r1pipe.config import RemoteLimits
from r1pipe.config.custom_rewards import TOKEN
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards.reply import DETAIL, Patience, score_of

REPLY_LIMIT = 1 << 20  # bytes
BACKOFF_S = 0.5  # before the second try; twice as long before each further one
TRY_AGAIN = (408, 429)  # and 5xx


class _NoRedirect(HTTPRedirectHandler):
    """A token must not follow to another place, and a POST would become a GET."""

    def redirect_request(self, *given: Any) -> None:
        return None


class RemoteReward:
    """One server."""

    def __init__(self, url: str, limits: RemoteLimits):
        self.url, self.limits = url, limits
        self._opener: OpenerDirector = build_opener(_NoRedirect)

    def ask(
        self, prompt: Prompt, completions: Sequence[Completion], patience: Patience
    ) -> list[Score | None]:
        """The score of each completion; None where the server has no rule for the prompt. Thread-safe."""
        sent = [
            {"text": c.text, "finish_reason": c.finish_reason, "length": len(c.tokens)} for c in completions
        ]
        body = json.dumps({"prompt": asdict(prompt), "completions": sent}, default=list).encode()
        why = ""
        for attempt in range(self.limits.retries + 1):
            if gone := patience.over:
                return [gone] * len(completions)
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                return self._scores(self._post(body), len(completions))
            except HTTPError as error:
                said = _reason_in(error)
                why = f"{error.code} {error.reason}" + (f": {said}" if said else "")
                if error.code < 500 and error.code not in TRY_AGAIN:
                    break
            except (OSError, HTTPException) as error:  # URLError and TimeoutError are OSErrors
                why = str(getattr(error, "reason", "") or error or type(error).__name__)
            except (TypeError, ValueError, RecursionError) as error:
                why = f"{self.url} answers no scores: {error}"
                return [Score(0.0, Status.VERIFIER_FAILED, why)] * len(completions)
        detail = f"{self.url}: {why[:DETAIL]}; {attempt + 1} requests"
        return patience.lose(len(completions), Score(0.0, Status.INFRASTRUCTURE_FAILED, detail))

    def _post(self, body: bytes) -> bytes:
        """The reply. Raises HTTPError, OSError or HTTPException; ValueError where it is too long."""
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token.strip()}"
        timeout_s = self.limits.timeout_s
        deadline = time.monotonic() + timeout_s
        content = b""
        with self._opener.open(Request(self.url, body, headers), timeout=timeout_s) as response:
            while piece := response.read1(1 << 16):
                content += piece
                if len(content) > REPLY_LIMIT:
                    raise ValueError(f"more than {REPLY_LIMIT} bytes")
                if time.monotonic() > deadline:  # a byte now and then keeps a connection open for ever
                    raise TimeoutError("timed out")
        return content

    def _scores(self, content: bytes, count: int) -> list[Score | None]:
        """Raises TypeError or ValueError on a reply of another shape."""
        reply = json.loads(content)
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list):
            raise TypeError("it has no list `scores`")
        if len(scores) != count:
            raise ValueError(f"{len(scores)} for {count} completions")
        return [score_of(score) for score in scores]


def _reason_in(error: HTTPError) -> str:
    """What a server says about the status that it answers; "" where its answer does not arrive."""
    with error:
        try:
            content: bytes = error.read1(DETAIL)
        except (OSError, HTTPException):
            return ""
    return " ".join(content.decode("utf-8", "replace").split())
