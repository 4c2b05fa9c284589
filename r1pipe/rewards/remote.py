"""Servers as rewards: a request for each group, tried again where the server or the way to it fails.

    POST {"prompt": {id, task, language, question, answer, checker, level, context, subject},
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
from urllib.error import HTTPError

from r1pipe.config import RemoteLimits
from r1pipe.config.custom_rewards import TOKEN
from r1pipe.core import http
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards.reply import DETAIL, Patience, score_of

REPLY_LIMIT = 1 << 20  # bytes
BACKOFF_S = 0.5  # before the second try; twice as long before each further one
NOT_SENT = ("source", "licence")  # where a prompt came from is not the server's business


class RemoteReward:
    """One server."""

    def __init__(self, url: str, limits: RemoteLimits):
        self.url, self.limits = url, limits

    def ask(
        self, prompt: Prompt, completions: Sequence[Completion], patience: Patience
    ) -> list[Score | None]:
        """The score of each completion; None where the server has no rule for the prompt. Thread-safe."""
        sent = [
            {"text": c.text, "finish_reason": c.finish_reason, "length": len(c.tokens)} for c in completions
        ]
        sent_prompt = {name: value for name, value in asdict(prompt).items() if name not in NOT_SENT}
        body = {"prompt": sent_prompt, "completions": sent}
        token, timeout_s = os.environ.get(TOKEN), self.limits.timeout_s
        why = ""
        for attempt in range(self.limits.retries + 1):
            if gone := patience.over:
                return [gone] * len(completions)
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                content = http.request(self.url, body, token, timeout_s, REPLY_LIMIT)
                return self._scores(content, len(completions))
            except (OSError, HTTPException) as error:
                why = http.reason(error)
                if isinstance(error, HTTPError) and not http.may_recover(error):
                    break
            except (TypeError, ValueError, RecursionError) as error:
                why = f"{self.url} answers no scores: {error}"
                return [Score(0.0, Status.VERIFIER_FAILED, why)] * len(completions)
        detail = f"{self.url}: {why[:DETAIL]}; {attempt + 1} requests"
        return patience.lose(len(completions), Score(0.0, Status.INFRASTRUCTURE_FAILED, detail))

    def _scores(self, content: bytes, count: int) -> list[Score | None]:
        """Raises TypeError or ValueError on a reply of another shape."""
        reply = json.loads(content)
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list):
            raise TypeError("it has no list `scores`")
        if len(scores) != count:
            raise ValueError(f"{len(scores)} for {count} completions")
        return [score_of(score) for score in scores]
