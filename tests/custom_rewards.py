"""Custom rewards for tests: their config, what they score, and a server that answers as told."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rl_runs import grpo

from r1pipe.config import PluginLimits, RemoteLimits, RewardsConfig
from r1pipe.core.types import Completion, Message, Prompt, Score
from r1pipe.rewards.custom import CustomRewards

PROMPT = Prompt("p", "word", "en", "2+2?", "4", {"pair": (1, 2)}, 3, (Message("system", "Be brief."),))
LIMITS = PluginLimits(workers=1, cpu_s=0.5, sleep_s=2.0, memory_gb=1.0)
REMOTE_LIMITS = RemoteLimits(connections=2, timeout_s=10.0, retries=2)


def completions(*texts: str) -> list[Completion]:
    return [Completion([7] * len(text), [0.0] * len(text), "stop", text) for text in texts]


def rewards_config(names: Sequence[str], **changed: Any) -> RewardsConfig:
    """With a weight of 1 for each name."""
    config = replace(grpo().rewards, plugin_limits=LIMITS, remote_limits=REMOTE_LIMITS, max_failed=0.5)
    return replace(config, weights={"accuracy": 1.0, **dict.fromkeys(names, 1.0)}, **changed)


def scores(custom: CustomRewards, *texts: str, name: str = "mine") -> list[Score | None]:
    """Of one group."""
    [found] = custom.score(name, [(PROMPT, completions(*texts))])
    return found


class Server(ThreadingHTTPServer):
    """Answers request number n with the n-th of `answers`, and all later ones with the last."""

    def __init__(self, answers: list[tuple[int, Any]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = answers, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.requests.append((json.loads(body), self.headers))
        status, content = server.answers[min(len(server.requests), len(server.answers)) - 1]
        if status == 0:  # dies
            self.connection.close()
            return
        if callable(content):
            return content(self)
        content = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *given: Any) -> None:
        pass


@contextmanager
def serving(*answers: tuple[int, Any]) -> Iterator[Server]:
    """Answers are (status, content). A status of 0 breaks the connection; content may be a function of the
    handler."""
    server = Server([*answers])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
