"""HTTP servers for tests: they give prepared replies, and record their requests."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (status, content). A status of 0 breaks the connection; content may be a function of the handler.
Reply = tuple[int, Any]


class FakeServer(ThreadingHTTPServer):
    def __init__(self, reply: Callable[[str, Any], Reply]):
        """`reply`: of a path, and the body of a POST or None."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.requests: list[Any] = []  # the bodies of POSTs
        self.headers: list[Any] = []  # theirs
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        self._send(*server.reply(self.path, None))

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(body)
        server.headers.append(self.headers)
        self._send(*server.reply(self.path, body))

    def _send(self, status: int, content: Any) -> None:
        if status == 0:
            self.connection.close()
            return
        if callable(content):
            content(self)
            return
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

    def log_message(self, *given: Any) -> None:
        pass


@contextmanager
def fake_server(reply: Callable[[str, Any], Reply]) -> Iterator[FakeServer]:
    server = FakeServer(reply)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def replying(*replies: Reply) -> Iterator[FakeServer]:
    """Request number n gets the n-th of `replies`, and all later ones the last."""
    rest = iter(replies)
    with fake_server(lambda path, body: next(rest, replies[-1])) as server:
        yield server


def say(*texts: str, finish: str = "stop", **message: Any) -> Reply:
    """A good reply to a chat request, with these choices."""
    choices = [{"message": {"content": text, **message}, "finish_reason": finish} for text in texts]
    return 200, {"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 4 * len(texts)}}


@contextmanager
def chat_server(reply: Callable[[Any], Reply], models: Any = None) -> Iterator[FakeServer]:
    """OpenAI's protocol: `reply` to the body of each chat request. It serves "m", or `models`."""
    listed = {"data": [{"id": "m"}]} if models is None else models

    def route(path: str, body: Any) -> Reply:
        if path == "/v1/models" and body is None:
            return 200, listed
        return reply(body) if path == "/v1/chat/completions" else (404, {})

    with fake_server(route) as server:
        yield server
