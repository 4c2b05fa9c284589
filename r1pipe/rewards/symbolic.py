"""Answers that are more than a plain number, judged by math-verify, and those to reasoning-gym, judged by its
scorers, in a worker that can be killed.

math-verify's own limits are signals, which fail silently outside a main thread and turn a timeout into a
wrong answer; so they are off, and the limit is kept from outside: a worker that does not reply in time is
killed and replaced, and its item is VERIFIER_FAILED. The worker is `symbolic_worker.py`, run as a program of
its own, because a forked or spawned copy of a training job would drag torch along.
"""

import json
import os
import select
import subprocess
import sys
import time
from queue import LifoQueue
from typing import Any

from r1pipe.core.types import Score, Status
from r1pipe.rewards import symbolic_worker
from r1pipe.rewards.jailed import encode
from r1pipe.runs import heartbeat

WORKERS = 2  # processes per rank
START_LIMIT_S = 60.0  # importing sympy, on a busy machine
ITEM_LIMIT_S = 5.0  # one comparison; ordinary ones take milliseconds
MEMORY_LIMIT = 2 << 30  # address space of a worker, bytes


class WorkerFailed(Exception):
    """The worker did not reply: too slow, killed, or never started."""


class Worker:
    """One child process that answers one JSON line with one JSON line."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.loaded: set[str] = set()  # tasks of reasoning-gym

    def ask(self, request: dict) -> dict:
        """The worker's reply. Raises WorkerFailed where there is none within ITEM_LIMIT_S."""
        process = self.process if self.process and self.process.poll() is None else self._start()
        task = request.get("task")
        try:
            if task and task not in self.loaded:
                with heartbeat.limited():
                    self._exchange(process, {"task": task}, START_LIMIT_S)
                self.loaded.add(task)
            return self._exchange(process, request, ITEM_LIMIT_S)
        except WorkerFailed:
            self.close()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        # the package lies where this process found it, and nothing else of its environment matters; numpy's
        # threads would take address space by the core
        environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        self.loaded.clear()
        command = [sys.executable, "-P", symbolic_worker.__file__, str(MEMORY_LIMIT)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        try:
            with heartbeat.limited():
                self._exchange(self.process, {"gold": "1", "answer": "1"}, START_LIMIT_S)
        except WorkerFailed as error:
            self.close()
            remedy = "run `pip install math-verify`"
            raise ChildProcessError(f"math-verify's worker does not start ({error}); {remedy}") from None
        return self.process

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], request: dict, limit: float) -> dict:
        """Neither way is waited for beyond the limit: a stopped worker takes what a pipe holds, no more."""
        assert process.stdin and process.stdout
        inlet, outlet, deadline = process.stdin.fileno(), process.stdout.fileno(), time.monotonic() + limit
        os.set_blocking(inlet, False)
        data, reply = json.dumps(request).encode() + b"\n", b""
        while not reply.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([outlet], [inlet] if data else [], [], left)
            if readable:
                more = os.read(outlet, 1 << 16)
                if not more:
                    raise WorkerFailed(f"the worker ended{_code(process)}")
                reply += more
            elif writable:
                try:
                    data = data[os.write(inlet, data) :]
                except BrokenPipeError:
                    raise WorkerFailed(f"the worker had ended{_code(process)}") from None
            else:
                raise WorkerFailed(f"no reply within {limit:.0f} s")
        try:
            return json.loads(reply)
        except ValueError:
            raise WorkerFailed("a reply that cannot be read") from None

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _code(process: subprocess.Popen[bytes]) -> str:
    try:
        return f" with code {process.wait(1)}"
    except subprocess.TimeoutExpired:
        return ""


_idle: LifoQueue[Worker] = LifoQueue()  # last in, first out: a warm worker comes before a cold one
for _ in range(WORKERS):
    _idle.put(Worker())  # starts no process until it is asked


def _ask(request: dict) -> dict:
    worker = _idle.get()
    try:
        return worker.ask(request)
    finally:
        _idle.put(worker)


def compare(gold: str, answer: str) -> Score:
    """1 where math-verify finds the answer equal to the gold one, else 0; safe to call from threads."""
    return _verdict({"gold": gold, "answer": answer}, f"{answer!r} is not {gold!r}")


def score_gym(task: str, entry: dict[str, Any], answer: str) -> Score:
    """1 where a task's own scorer finds an answer to its entry wholly right, else 0; safe from threads."""
    return _verdict({"task": task, "entry": encode(entry), "answer": answer}, f"not right for {task}")


def _verdict(request: dict, wrong: str) -> Score:
    try:
        reply = _ask(request)
    except WorkerFailed as error:
        return Score(0.0, Status.VERIFIER_FAILED, str(error))
    except OSError as error:
        return Score(0.0, Status.INFRASTRUCTURE_FAILED, str(error))
    if reply["error"]:
        return Score(0.0, Status.VERIFIER_FAILED, reply["error"])
    return Score(float(reply["right"]), detail="" if reply["right"] else wrong)


def parses(gold: str) -> bool:
    """Whether a gold answer is an expression that equals itself. ChildProcessError without a worker."""
    try:
        reply = _ask({"gold": gold, "answer": gold})
    except WorkerFailed:
        return False
    return bool(reply["right"])
