"""The HTTP server: who may connect, and how many. A connection's thread is Handler's (handler.py)."""

import json
import os
import socket
import sys
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from r1pipe.config.serving import ServeConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.serve.engine import Engine
from r1pipe.serve.handler import POLL_S, Handler, error_content
from r1pipe.serve.protocol import Reader


class Server(ThreadingHTTPServer):
    """Listens for clients; `open_to` is called before `serve_forever`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, config: ServeConfig):
        """Raises EnvironmentProblem where it cannot listen."""
        self.config, self.key = config, os.environ.get(config.key_variable, "")
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.reader: Reader
        self.engine: Engine
        self._lock, self._connections, self.answering = threading.Lock(), 0, 0
        try:
            super().__init__((config.host, config.port), Handler)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise EnvironmentProblem(
                f"cannot listen on {config.host} port {config.port} ({why}); give another --port or --host"
            ) from None

    def open_to(self, reader: Reader, engine: Engine) -> None:
        self.reader, self.engine = reader, engine

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        host = host.decode() if isinstance(host, bytes) else host
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}/v1"

    def is_named(self, host: str) -> bool:
        """Whether a Host header names this server: by an address or a name that no stranger's DNS gives out.
        The port may be that of a tunnel. On loopback no other address leads here."""
        try:
            parts = urlsplit(f"//{host}")
            name, _ = parts.hostname or "", parts.port
        except ValueError:
            return False
        with suppress(ValueError):
            address = ip_address(name)
            return address.is_loopback or not self._is_loopback()
        names = {"localhost", self.config.host.lower()}
        return name in names or (not self._is_loopback() and name == socket.gethostname().lower())

    def _is_loopback(self) -> bool:
        return ip_address(self.server_name.partition("%")[0]).is_loopback

    def server_bind(self) -> None:
        """As TCPServer's: HTTPServer's looks a name up, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = self._connections >= self.config.max_connections
            self._connections += not full
        if full:
            body = json.dumps(
                error_content(503, "too many connections (serve.max_connections)", "busy", None)
            ).encode()
            head = f"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            try:
                request.settimeout(POLL_S)
                request.sendall(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + body)
            except OSError:
                pass
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._connections -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone or is too slow is no error; anything else is one of ours, and shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def count(self, change: int) -> None:
        """How many requests are being answered."""
        with self._lock:
            self.answering += change
