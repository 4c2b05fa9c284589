"""A vLLM server as far as r1pipe talks to one: it draws from a tiny model, and really receives weights.

Faults are made by its attributes, or by killing and restarting it.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch

from r1pipe.model.policy import Policy, named_weights
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.rollout.vllm.worker import r1pipe_wire as wire

FIRST = "default"  # vLLM's label of the weights that a server starts with
CPU = torch.device("cpu")


class FakeVLLM(ThreadingHTTPServer):
    """The server; `url` is where it is."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: Policy, words: dict[str, int], port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.model = model.eval()
        config = model.config
        self.facts: dict[str, Any] = {
            "protocol": wire.PROTOCOL,
            "vocabulary": wire.vocabulary_hash(words),
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "max_model_len": config.max_position_embeddings,
            "logprobs_mode": "processed_logprobs",
            "device": "cpu",
        }
        self.version = FIRST
        self.seen: list[str] = []  # requests, in order
        self.asked: list[dict[str, Any]] = []  # bodies of /inference/v1/generate
        self.fail: dict[str, int] = {}  # path -> how often it answers 500
        self.on: dict[str, Callable[[], Any]] = {}  # path -> what happens before the next answer
        self.hang = threading.Event()  # set: no completion comes any more
        self.after: dict[int, Callable[[], Any]] = {}  # number of a completion -> what happens before it
        self.connections: set[Any] = set()
        self.drawn = 0
        self.loaded: set[str] = set()
        self.group: Any = None
        self.paused = False
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def die(self) -> None:
        """As a process that ends: whoever waits for an answer is told."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            self.connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""

    # --- what it answers

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.asked.append(body)
            if todo := self.after.pop(len(self.asked), None):
                todo()
        while self.hang.is_set() or self.paused:
            time.sleep(0.01)
        asked = body["sampling_params"]
        params = SamplingParams(
            max_tokens=asked["max_tokens"],
            temperature=asked["temperature"],
            top_p=asked["top_p"],
            seed=asked.get("seed", 0),
            ignore_eos=asked["ignore_eos"],
            stop_token_ids=tuple(asked["stop_token_ids"]),
        )
        with self.lock:
            [drawn] = Batcher(self.model).generate([body["token_ids"]], params)
            self.drawn += len(drawn.tokens)
            version = self.version
        spans = [{"version": version, "start": 0, "end": len(drawn.tokens)}]
        content = [{"token_id": t, "logprob": p} for t, p in zip(drawn.tokens, drawn.logprobs, strict=True)]
        choice = {"index": 0, "token_ids": drawn.tokens, "finish_reason": drawn.finish_reason}
        choice |= {
            "weight_versions": spans,
            "logprobs": {"content": content} if "logprobs" in asked else None,
        }
        return {"choices": [choice]}

    def connect(self, info: dict[str, Any]) -> None:
        where = info["address"], info["port"], info["name"], 1, info["size"]
        self.group = wire.connect(*where, CPU, info["timeout_s"])

    def receive(self, layout: Any) -> None:
        own = named_weights(self.model)
        with torch.no_grad():
            for name, tensor in wire.receive(self.group, layout, CPU):
                own[name].copy_(tensor)
                self.loaded.add(name)

    def rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        missing = sorted(set(named_weights(self.model)) - self.loaded)
        return {"results": [self.facts if body["method"] == "r1pipe_facts" else missing]}

    def start(self) -> None:
        assert self.paused
        self.loaded = set()

    def label(self, body: dict[str, Any]) -> None:
        self.version = body.get("weight_version", self.version)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        table: dict[str, Callable[[], Any]] = {
            "/weight_info": lambda: {"weight_version": self.version},
            "/get_world_size": lambda: {"world_size": 1},
            "/collective_rpc": lambda: self.rpc(body),
            "/inference/v1/generate": lambda: self.generate(body),
            "/init_weight_transfer_engine": lambda: self.connect(body["init_info"]),
            "/pause": lambda: setattr(self, "paused", True),
            "/start_weight_update": self.start,
            "/update_weights": lambda: self.receive(body["update_info"]["layout"]),
            "/finish_weight_update": lambda: self.label(body),
            "/reset_prefix_cache": lambda: {"success": True},
            "/resume": lambda: setattr(self, "paused", False),
        }
        return table.get(path, dict)() or {}


class Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body: dict[str, Any]) -> None:
        path = urlsplit(self.path).path
        self.server.seen.append(self.path)
        if before := self.server.on.pop(path, None):
            before()
        status = 200
        if self.server.fail.get(path, 0):
            self.server.fail[path] -= 1
            status = 500
        content: Any = {"error": {"message": "made on purpose"}}
        if status == 200 and path == "/metrics":
            content = f'vllm:generation_tokens_total{{engine="0"}} {self.server.drawn}.0\n'
        elif status == 200:
            content = self.server.answer(path, body)
        sent = (content if isinstance(content, str) else json.dumps(content)).encode()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)


@contextmanager
def fake_vllm(model: Policy, words: dict[str, int]) -> Iterator[FakeVLLM]:
    server = FakeVLLM(model, words)
    try:
        yield server
    finally:
        server.die()
