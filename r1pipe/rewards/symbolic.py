"""Formulas compared, and answers to reasoning-gym checked by its scorers, in a worker that can be killed.

The system ends a worker whose item takes more processor time than ITEM_CPU_LIMIT_S; it is replaced, and its
item is VERIFIER_FAILED. The worker is `symbolic_worker.py`, run as a program of its own, because a forked or
spawned copy of a training job would drag torch along.
"""

import os
import signal
import sys
from queue import LifoQueue
from typing import Any

from r1pipe.core.types import Score, Status
from r1pipe.rewards import symbolic_worker
from r1pipe.rewards.programs.jailed import encode
from r1pipe.rewards.worker_process import ChildEnded, NoReply, WorkerProcess
from r1pipe.runs import heartbeat

WORKERS = 2  # processes per rank
ITEM_CPU_LIMIT_S = 5.0  # one comparison; ordinary ones take milliseconds
MEMORY_LIMIT = 2 << 30  # address space of a worker, bytes


class Worker:
    """A process that checks one item at a time; started for the first, and restarted after a failure."""

    def __init__(self) -> None:
        self.child: WorkerProcess | None = None
        self.loaded: set[str] = set()  # tasks of reasoning-gym

    def ask(self, request: dict) -> dict:
        """The worker's reply. Raises NoReply where there is none, OSError where no worker can be started."""
        child = self.child if self.child and not self.child.has_ended() else self._start()
        task = request.get("task")
        try:
            if task and task not in self.loaded:
                with heartbeat.limited():
                    child.ask({"task": task}, may_sleep=True)
                self.loaded.add(task)
            return child.ask(request | {"cpu_limit_s": ITEM_CPU_LIMIT_S})
        except NoReply:
            self.close()
            raise

    def _start(self) -> WorkerProcess:
        # the worker needs this process's import path and nothing else of its environment; numpy would take
        # address space for a thread per core
        environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        self.loaded.clear()
        command = [sys.executable, "-P", symbolic_worker.__file__, str(MEMORY_LIMIT)]
        self.child = child = WorkerProcess(command, environment)
        try:
            with heartbeat.limited():
                child.ask({"gold": "1", "answer": "1"}, may_sleep=True)
        except NoReply as error:
            self.close()
            remedy = "run `pip install latex2sympy2_extended`"
            raise ChildProcessError(f"the worker for formulas does not start ({error}); {remedy}") from None
        return child

    def close(self) -> None:
        if self.child:
            self.child.close()
            self.child = None


_idle: LifoQueue[Worker] = LifoQueue()  # last in, first out: a warm worker comes before a cold one
for _ in range(WORKERS):
    _idle.put(Worker())  # starts its process at the first request


def _ask(request: dict) -> dict:
    worker = _idle.get()
    try:
        return worker.ask(request)
    finally:
        _idle.put(worker)


class NoVerdict(Exception):
    """A comparison that has no result; `score` says why."""

    def __init__(self, score: Score):
        super().__init__(score.detail)
        self.score = score


def equal(gold: str, answer: str, relation: str = "") -> bool:
    """Whether two formulas in LaTeX are equal; thread-safe. Raises NoVerdict.

    With a `relation` ("=", "<" ...) both are the difference of its sides.
    """
    score = compare(gold, answer, relation)
    if score.status is not Status.SCORED:
        raise NoVerdict(score)
    return score.value == 1.0


def compare(gold: str, answer: str, relation: str = "") -> Score:
    """1 where the formulas are equal, else 0; thread-safe."""
    return _score({"gold": gold, "answer": answer, "relation": relation}, f"{answer!r} is not {gold!r}")


def score_gym(task: str, entry: dict[str, Any], answer: str) -> Score:
    """1 where the task's own scorer gives the answer full marks, else 0; thread-safe."""
    return _score({"task": task, "entry": encode(entry), "answer": answer}, f"not right for {task}")


def _score(request: dict, wrong: str) -> Score:
    try:
        reply = _ask(request)
    except NoReply as error:
        timed_out = isinstance(error, ChildEnded) and error.code == -signal.SIGPROF
        detail = f"no verdict within {ITEM_CPU_LIMIT_S:g} s of processor time" if timed_out else str(error)
        return Score(0.0, Status.VERIFIER_FAILED, detail)
    except OSError as error:
        return Score(0.0, Status.INFRASTRUCTURE_FAILED, str(error))
    if reply["error"]:
        return Score(0.0, Status.VERIFIER_FAILED, reply["error"])
    return Score(float(reply["right"]), detail="" if reply["right"] else wrong)


def parses(gold: str) -> bool:
    """Whether a gold answer is an expression that equals itself. ChildProcessError without a worker."""
    try:
        return bool(_ask({"gold": gold, "answer": gold})["right"])
    except NoReply:
        return False
