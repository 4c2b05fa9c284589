"""A server in OpenAI's protocol for tests: it answers as told and remembers what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# The reply to a chat request: (status, content). A status of 0 breaks the connection.
Reply = Callable[[dict[str, Any]], tuple[int, Any]]


def say(*texts: str, finish: str = "stop", **message: Any) -> tuple[int, dict[str, Any]]:
    """A good reply with these choices."""
    choices = [{"message": {"content": text, **message}, "finish_reason": finish} for text in texts]
    return 200, {"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 4 * len(texts)}}


class ChatServer(ThreadingHTTPServer):
    def __init__(self, reply: Reply, models: Any):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.models = reply, models
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        self._send(*((200, server.models) if self.path == "/v1/models" else (404, {})))

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(body)
        server.headers.append(self.headers)
        self._send(*(server.reply(body) if self.path == "/v1/chat/completions" else (404, {})))

    def _send(self, status: int, content: Any) -> None:
        if status == 0:
            self.connection.close()
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

    def log_message(self, *given: Any) -> None:
        pass


@contextmanager
def chat_server(reply: Reply, models: Any = None) -> Iterator[ChatServer]:
    """A server whose replies `reply` makes of each request's body; it serves "m" unless told otherwise."""
    server = ChatServer(reply, {"data": [{"id": "m"}]} if models is None else models)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
