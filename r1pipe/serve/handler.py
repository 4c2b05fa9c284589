"""One connection: reads requests, waits for the engine, and writes what it tells."""

import hmac
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from queue import Empty
from typing import Any, NoReturn, Protocol
from urllib.parse import unquote, urlsplit

from r1pipe.config.serving import ServeConfig
from r1pipe.serve.engine import Engine
from r1pipe.serve.protocol import Asked, Reader, Refused
from r1pipe.serve.replies import Reply
from r1pipe.serve.request import Busy, Closing, Failed

POLL_S = 0.5  # how often a connection is looked at while its answer is drawn
DISCARDED = 1 << 26  # bytes of a refused body that are read, so that the client reads why
PIECE = 1 << 16
LARGEST = 18  # digits of a Content-Length


class Serving(Protocol):
    """What a connection needs of its server."""

    config: ServeConfig
    key: str  # that clients must show; "": none
    url: str
    reader: Reader
    engine: Engine

    def is_named(self, host: str) -> bool:
        """Whether a Host header names this server."""

    def count(self, change: int) -> None:
        """How many more requests are being answered."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "r1pipe", ""
    server: Serving  # type: ignore[assignment]
    streaming = False  # an answer has begun
    unread = False  # a body has not been read to its end: no request can follow it

    def setup(self) -> None:
        self.request.settimeout(self.server.config.client_s)
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing for each request."""

    def do_GET(self) -> None:
        self._answering(self._get)

    def do_POST(self) -> None:
        self._answering(self._post)

    def _answering(self, answer: Callable[[str], None]) -> None:
        self.streaming = False
        self.unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.server.count(1)
        try:
            path = urlsplit(self.path).path.rstrip("/")
            if path != "/health":
                self._check_client()
            answer(path)
        except Refused as refused:
            self._refuse(refused)
        except Busy:
            self._refuse(Refused(429, "too many answers are waiting (serve.max_waiting); ask again", "busy"))
        except Closing:
            self._refuse(Refused(503, "the server is about to end", "closing"))
        finally:
            self.server.count(-1)

    def _check_client(self) -> None:
        """Raises Refused for a client without the key, and for a page of some site in a browser: one that
        asks across origins, and one whose own name was made to lead here (DNS rebinding); it has no key."""
        for host in self.headers.get_all("Host", []) if not self.server.key else []:
            if not self.server.is_named(host):
                remedy = f"start it with --host NAME, or with a key in ${self.server.config.key_variable}"
                message = f"this server is not called {host[:80]!r}; ask {self.server.url}, {remedy}"
                raise Refused(403, message, "forbidden")
        origin = self.headers.get("Origin")
        if origin and urlsplit(origin).netloc != self.headers.get("Host"):
            raise Refused(403, "requests from web pages of other origins are not answered", "forbidden")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if self.server.key and not hmac.compare_digest(given.encode(), self.server.key.encode()):
            message = "the key is missing or wrong; send it as Authorization: Bearer KEY"
            raise Refused(401, message, "invalid_api_key")

    def _get(self, path: str) -> None:
        model = self._model()
        if path == "/health":
            running, waiting = self.server.engine.state()
            alive = self.server.engine.alive
            state = {"status": "ok" if alive else "closing", "running": running, "waiting": waiting}
            self._json(200 if alive else 503, state)
        elif path == "/v1/models":
            self._json(200, {"object": "list", "data": [model]})
        elif path.startswith("/v1/models/"):
            if unquote(path.removeprefix("/v1/models/")) != model["id"]:
                raise Refused(
                    404, f"there is no such model; this server has {model['id']}", "model_not_found"
                )
            self._json(200, model)
        else:
            self._no_such(path)

    def _post(self, path: str) -> None:
        reader = self.server.reader
        readers = {"/v1/chat/completions": reader.of_chat, "/v1/completions": reader.of_completion}
        body = self._body()
        if path not in readers:
            self._no_such(path)
        asked = readers[path](body)
        reply = Reply(asked, reader.chat, reader.name)
        if asked.stream:
            self._stream(asked, reply)
        else:
            for _ in self._chunks(asked, reply):
                pass
            self._json(200, reply.whole())

    def _no_such(self, path: str) -> NoReturn:
        known = "/v1/chat/completions, /v1/completions (POST), /v1/models, /health (GET)"
        raise Refused(404, f"{self.command} {path[:80]}: no such address; known: {known}", "not_found")

    def _model(self) -> dict[str, Any]:
        reader = self.server.reader
        model = {"id": reader.name, "object": "model", "created": reader.created, "owned_by": "r1pipe"}
        return {**model, "max_model_len": reader.longest}

    def _body(self) -> Any:
        """The JSON of the request. Raises Refused."""
        given = self.headers.get("Content-Length", "")
        if not given.isdecimal() or len(given) > LARGEST:
            raise Refused(400, "Content-Length is missing or no number")
        length, most = int(given), int(self.server.config.max_body_mb * 2**20)
        if length > most:
            raise Refused(
                413, f"the body has {length} bytes; at most {most} (serve.max_body_mb)", "too_large"
            )
        ends, parts, left = time.monotonic() + self.server.config.client_s, [], length
        while left:
            part = self.rfile.read1(min(left, PIECE))
            if not part:
                raise ConnectionResetError
            if time.monotonic() > ends:
                raise Refused(408, "the body comes too slowly (serve.client_s)", "timeout")
            parts.append(part)
            left -= len(part)
        self.unread = False
        try:
            content = json.loads(b"".join(parts).decode(), parse_constant=_no_number)
            json.dumps(content, ensure_ascii=False).encode()  # no half of a surrogate pair
            return content
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}", "invalid_json") from None

    def _chunks(self, asked: Asked, reply: Reply) -> Iterator[dict[str, Any]]:
        """The chunks of the reply until nothing is left. Raises Refused, Busy, Closing, and ConnectionError
        where the client has gone; then nothing more is drawn for it."""
        engine, request, config = self.server.engine, asked.request, self.server.config
        ends = time.monotonic() + config.request_s
        look = time.monotonic() + POLL_S
        engine.submit(request)
        try:
            yield from reply.first_chunks() if asked.stream else []
            while reply.left:
                if time.monotonic() > ends:
                    limit = f"{config.request_s:g} s (serve.request_s)"
                    raise Refused(503, f"the answer takes longer than {limit}; ask for less", "timeout")
                if time.monotonic() > look:
                    self._check_connected()
                    look = time.monotonic() + POLL_S
                try:
                    news = request.news.get(timeout=POLL_S)
                except Empty:
                    continue
                if isinstance(news, Failed):
                    raise Refused(news.status, news.message, "failed")
                if chunk := reply.take(news):
                    yield chunk
                    answer = chunk["choices"][0]
                    if answer["finish_reason"]:
                        engine.drop(request, answer["index"])
            yield from reply.last_chunks()
        finally:
            engine.drop(request)

    def _check_connected(self) -> None:
        """Raises ConnectionResetError where the client has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError

    def _stream(self, asked: Asked, reply: Reply) -> None:
        """Server-sent events; the end of the connection ends the stream."""
        for chunk in self._chunks(asked, reply):
            if not self.streaming:
                self.streaming = self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.send_header("Cache-Control", "no-cache")
                self.send_header("Connection", "close")
                self.end_headers()
            self._event(json.dumps(chunk))
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _refuse(self, refused: Refused) -> None:
        content = error_content(refused.status, refused.message, refused.code, refused.param)
        if self.streaming:
            self._event(json.dumps(content))
            return
        self.close_connection |= self.unread
        self._json(refused.status, content)
        if self.unread:
            self._discard()

    def _json(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _discard(self) -> None:
        """Read what a client is still sending: it would not read the reply before it has sent all."""
        self.connection.settimeout(POLL_S)
        left, ends = DISCARDED, time.monotonic() + self.server.config.client_s
        while left > 0 and time.monotonic() < ends and (part := self.rfile.read1(PIECE)):
            left -= len(part)

    def handle_expect_100(self) -> bool:
        """Whether the client may send its body: one that is too large is refused before."""
        given = self.headers.get("Content-Length", "")
        if given.isdecimal() and int(given[:LARGEST]) > self.server.config.max_body_mb * 2**20:
            self.close_connection = True
            self.send_error(413)
            return False
        return super().handle_expect_100()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, as the other errors: bad request lines, headers and methods."""
        code = 405 if code == HTTPStatus.NOT_IMPLEMENTED else int(code)
        self.close_connection = True
        text = message or HTTPStatus(code).phrase
        self._json(code, error_content(code, text, "invalid_request", None))


def error_content(status: int, message: str, code: str, param: str | None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
