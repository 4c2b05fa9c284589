"""HTTP to one vLLM server: token ids in and out, and the control of weight updates.

What can go wrong comes as one of two errors. Gone: the server is dead, hangs or has failed; it may return.
Refused: it answers, and no patience will change the answer.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlencode, urlsplit

from r1pipe.core.errors import SamplerLost

UNIX = "unix:"
TOKEN = "R1PIPE_SAMPLER_TOKEN"  # variable with the key that a server was started with (vLLM's --api-key)
PATIENCE_S = 10.0  # for answers that need no work: is the server there, and what does it serve
REPLY_LIMIT = 1 << 30  # bytes
SAID = 300  # characters shown of what a server says
GENERATED = "vllm:generation_tokens_total"  # of /metrics


class Gone(Exception):
    """The server cannot be reached, does not answer in time, or failed."""


class Failed(Gone):
    """It answers, with an error of its own (5xx)."""


class Refused(SamplerLost):
    """The server does not take a request, or is not what it should be; asking again is no use."""


class Client:
    """One server. Thread-safe."""

    def __init__(self, url: str, timeout_s: float):
        """`url`: http(s)://HOST[:PORT], or unix:PATH of a socket; `timeout_s`: of all requests but
        `generate`."""
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        parts = urlsplit(self.url)
        self._path = self.url.removeprefix(UNIX) if self.url.startswith(UNIX) else ""
        self._secure, self.host = parts.scheme == "https", parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._secure else 80)
        self._lock = threading.Lock()
        self._under_way: set[HTTPConnection] = set()

    # --- what is there

    def version(self) -> str:
        """The label of the weights that are served."""
        return str(self.get("/weight_info", PATIENCE_S).get("weight_version"))

    def workers_say(self, method: str) -> list[Any]:
        """What each worker answers to a call of r1pipe's extension. Raises Refused where they have none."""
        try:
            found = self.post("/collective_rpc", {"method": method}).get("results")
        except (Failed, Refused) as error:
            self.get("/health", PATIENCE_S)  # Gone if it is
            raise Refused(
                f"the server at {self.url} does not know r1pipe's extension ({error}); start it as "
                "docs/guide.md says, or give sampler.url=null and r1pipe starts one"
            ) from None
        if not isinstance(found, list) or not found:
            raise Refused(f"{self.url} is no vLLM server; give sampler.url=http://HOST:PORT of one")
        return found

    def workers(self) -> int:
        return int(self.get("/get_world_size")["world_size"])

    def generated(self) -> float:
        """How many tokens the server has drawn since it began: what moves while it works."""
        text = self._call("GET", "/metrics", None, PATIENCE_S).decode("utf-8", "replace")
        counts = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(GENERATED)]
        with suppress(ValueError):
            return sum(map(float, counts))
        raise Gone(f"{self.url}/metrics has no {GENERATED}")

    # --- requests

    def get(self, path: str, timeout_s: float | None = None) -> dict[str, Any]:
        return self._object(path, self._call("GET", path, None, timeout_s or self.timeout_s))

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None, **query: str
    ) -> dict[str, Any]:
        """Raises Gone or Refused, as every request here."""
        where = f"{path}?{urlencode(query)}" if query else path
        return self._object(where, self._call("POST", where, body or {}, timeout_s or self.timeout_s))

    def generate(self, tokens: list[int], params: Mapping[str, Any]) -> dict[str, Any]:
        """One choice for one prompt. Waits as long as it takes; `hang_up` ends that."""
        body = {"token_ids": tokens, "sampling_params": dict(params)}
        choices = self._object("", self._call("POST", "/inference/v1/generate", body, None)).get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise Refused(f"{self.url} answers no completion; is it a vLLM server with --enable-scale-out?")
        return choices[0]

    def hang_up(self) -> None:
        """End every request under way: each raises Gone, and vLLM stops working on it."""
        with self._lock:
            connections = list(self._under_way)
        for connection in connections:
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _object(self, path: str, content: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(content) if content.strip() else {}
        except (ValueError, RecursionError) as error:
            raise Refused(f"{self.url}{path} answers no JSON ({error}); is it a vLLM server?") from None
        if not isinstance(reply, dict):
            raise Refused(f"{self.url}{path} answers no JSON object; is it a vLLM server?")
        return reply

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None) -> bytes:
        where = f"{self.url}{path.partition('?')[0]}"
        sent = None if body is None else json.dumps(body).encode()
        connection = self._connection(timeout_s)
        with self._lock:
            self._under_way.add(connection)
        try:
            status, content = self._exchange(connection, method, path, sent)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: too long
            raise Gone(f"{where}: {str(error) or type(error).__name__}") from None
        finally:
            with self._lock:
                self._under_way.discard(connection)
            connection.close()
        if status >= 500:
            raise Failed(f"{where} answers {status}: {_said(content)}")
        if status >= 300:
            raise Refused(
                f"{where} answers {status}: {_said(content)}; is it a vLLM server, started as docs/guide.md "
                f"says? (a server with a key: {TOKEN}=KEY)"
            )
        return content

    def _connection(self, timeout_s: float | None) -> HTTPConnection:
        """A new one for each request: one that is kept may be closed just as the next request is sent, and a
        request that may have arrived must not be sent again."""
        if self._path:
            return _SocketConnection(self._path, timeout_s)
        kind = HTTPSConnection if self._secure else HTTPConnection
        return kind(self.host, self._port, timeout=timeout_s)

    def _exchange(
        self, connection: HTTPConnection, method: str, path: str, sent: bytes | None
    ) -> tuple[int, bytes]:
        headers = {"Connection": "close"}
        if sent is not None:
            headers["Content-Type"] = "application/json"
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token.strip()}"
        deadline = None if connection.timeout is None else time.monotonic() + connection.timeout
        connection.request(method, path, sent, headers)
        response = connection.getresponse()
        content = bytearray()
        while piece := response.read1(1 << 16):
            content += piece
            if len(content) > REPLY_LIMIT:
                raise ValueError(f"more than {REPLY_LIMIT} bytes")
            if deadline and time.monotonic() > deadline:  # a byte now and then would keep it open for ever
                raise TimeoutError("timed out")
        return response.status, bytes(content)


class _SocketConnection(HTTPConnection):
    """To a server on this machine, by a socket that is a file: nobody but its owner can reach it."""

    def __init__(self, path: str, timeout_s: float | None):
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _said(content: bytes) -> str:
    """What a server says about its refusal, in one line."""
    text = content.decode("utf-8", "replace")
    with suppress(ValueError, RecursionError, TypeError, AttributeError):
        reply = json.loads(text)
        error = reply.get("error", reply.get("detail", text))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    return " ".join(text.split())[:SAID] or "nothing"
