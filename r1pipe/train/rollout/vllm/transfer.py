"""The trainer's end of a weight update: rank 0 sends bucket after bucket to all of a server's workers.

pause, start, a bucket at a time, finish with the new version, forget the prefixes that were cached, resume
(vLLM's own sequence). In between the server draws nothing, so no token comes from weights half replaced.
"""

import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1pipe.runs import heartbeat
from r1pipe.train.rollout.vllm.client import Client, Gone, Refused
from r1pipe.train.rollout.vllm.worker import r1pipe_wire as wire

TICK_S = 1.0
START_AGAIN = 2  # tries of `begin`: an update that another trainer left open is closed first


class Transfer:
    """Connects to a server's workers and updates their weights. Every method may raise Gone or Refused."""

    def __init__(self, client: Client, device: torch.device, timeout_s: float):
        """`device`: of the trainer. NCCL carries the buckets where both ends are GPUs (`over_gpus`), and gloo
        elsewhere: NCCL cannot connect two processes on one GPU."""
        self.client, self.device, self.timeout_s = client, device, timeout_s
        self.over_gpus = False
        self._group: Any = None
        self._store: dist.TCPStore | None = None

    def begin(self, keep: bool) -> None:
        """Pause the server and open an update. `keep`: requests under way go on after it; otherwise they end
        unfinished."""
        self.client.post("/pause", mode="keep" if keep else "abort")
        if self._group is None:
            self._connect()
        for attempt in range(START_AGAIN):
            try:
                self.client.post("/start_weight_update")
                return
            except Gone:
                if attempt + 1 == START_AGAIN:
                    raise
                self._close_open_update()

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """One bucket of weights under their published names."""
        layout = wire.layout_of(tensors)
        reply = self._ask("/update_weights", {"update_info": {"layout": layout}})
        try:
            wire.send(self._group, wire.pack(tensors, self._over()), lambda: _has_failed(reply))
        except wire.Broken as error:
            self.disconnect()
            _answer(reply)  # what the server says is the better reason
            raise Gone(f"{self.client.url}: the connection for weights is lost ({error})") from None
        _answer(reply)

    def finish(self, version: str, keep: bool) -> None:
        """Close the update: the server now serves `version`, with no entry left of another in its cache."""
        for missing in self.client.workers_say("r1pipe_missing"):
            if missing:
                raise Refused(
                    f"the model of {self.client.url} has {missing[0]} and {len(missing) - 1} other tensors "
                    "that the trainer's has not; start the server with the trainer's own model"
                )
        reset = self.client.post("/reset_prefix_cache", reset_running_requests=str(keep).lower())
        if not reset.get("success"):  # what it holds of the old weights would be read as the new ones'
            raise Gone(f"{self.client.url} keeps its prefix cache, which the old weights made")
        # last, so that a server that says `version` has nothing left of another
        self.client.post("/finish_weight_update", {"weight_version": version})
        self.client.post("/resume")
        if (served := self.client.version()) != version:
            raise Gone(f"{self.client.url} serves weights {served} after an update to {version}")

    def disconnect(self) -> None:
        """The next update connects anew."""
        self._group = None

    def _over(self) -> torch.device:
        return self.device if self.over_gpus else torch.device("cpu")

    def _ask(self, path: str, body: Mapping[str, Any]) -> "Future[dict[str, Any]]":
        """A request that the server answers once this end has done its part."""
        return _aside(self.client.post, path, body)

    def _connect(self) -> None:
        address, name = _address_towards(self.client.host), secrets.token_hex(16)
        size, over = 1 + self.client.workers(), self._over()
        timeout = timedelta(seconds=self.timeout_s)
        # a new one for each connection: one that failed may still wait, and let nobody else use its store
        store = dist.TCPStore(address, 0, None, is_master=True, timeout=timeout, wait_for_workers=False)
        info = {"address": address, "port": store.port, "name": name, "size": size, "over": over.type}
        info |= {"timeout_s": self.timeout_s, "protocol": wire.PROTOCOL}
        reply = self._ask("/init_weight_transfer_engine", {"init_info": info})
        named = dist.PrefixStore(name, store)
        group = _aside(wire.join, named, 0, size, address, over, self.timeout_s)  # the others may have failed
        while not wait([reply, group], TICK_S, return_when=FIRST_COMPLETED).done:
            heartbeat.tick()
        if reply.done():
            reply.result()
        try:
            self._group, self._store = _answer(group), store
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise Gone(f"{self.client.url}: no connection for weights ({why})") from None
        _answer(reply)

    def _close_open_update(self) -> None:
        try:
            self.client.post("/finish_weight_update")
        except Gone:  # it was not open: what `start` says next is the reason
            return


def _aside(work: Callable[..., Any], *given: Any) -> "Future[Any]":
    """`work` in a thread that nobody waits for at the job's end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(*given))
        except (Gone, Refused, RuntimeError) as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _has_failed(reply: "Future[Any]") -> bool:
    """An answer that all is well may come before this end knows that the last byte is through."""
    return reply.done() and reply.exception() is not None


def _answer(reply: "Future[Any]") -> Any:
    """Wait for what has a limit of time of its own; a wait is no reason to call this rank stuck."""
    while not wait([reply], TICK_S).done:
        heartbeat.tick()
    heartbeat.tick()
    return reply.result()


def _address_towards(host: str) -> str:
    """This machine's address as `host` reaches it."""
    try:
        family = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family[0], socket.SOCK_DGRAM) as reached:
            reached.connect(family[4])  # sends nothing
            return str(reached.getsockname()[0])
    except OSError as error:
        raise Gone(f"{host} is no machine that can be reached ({error})") from None
