"""Reward workers that are killed, hang or run out of memory: the item is marked, the pool whole again."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import eating_worker
import psutil

from faults.outcome import Outcome
from r1pipe.core.types import Prompt, Score, Status
from r1pipe.rewards import symbolic, symbolic_worker
from r1pipe.rewards.programs import check, isolation, jail, limits, sandbox
from r1pipe.rewards.programs.check import check_program
from r1pipe.rewards.programs.monty import Monty

GOLD, RIGHT, WRONG, ENDLESS = r"\sqrt{2}", r"2^{1/2}", r"\sqrt{3}", r"\prod_{k=1}^{10^{6}} k"
PROGRAM = Prompt("f", "program", "en", "?", "", {"entry_point": "f", "tests": [[[2], 4]]})
DOUBLE = "```python\ndef f(x): return x + x\n```"
LOOP = "```python\ndef f(x):\n    while True: pass\n```"
MARKED = (Status.VERIFIER_FAILED, Status.INFRASTRUCTURE_FAILED)


def run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]:
    draw, times = random.Random(seed), 1 if short else 10
    whole(set())  # started, and warm
    yield row("reward worker killed (kill -9)", times, lambda: compared(draw, signal.SIGKILL, ENDLESS))
    yield row("reward worker hung (SIGSTOP)", times, lambda: compared(draw, signal.SIGSTOP, RIGHT))
    long_answer = "1" * (1 << 18)  # more than a pipe holds: it cannot even be handed over
    yield row("reward worker hung, long answer", times, lambda: compared(draw, signal.SIGSTOP, long_answer))
    yield row("reward worker out of memory", times, out_of_memory)
    yield row("program's interpreter killed", times, lambda: interpreted(draw, Monty))
    if jail.is_available():
        yield row("program's jail killed", times, lambda: interpreted(draw, jail.Jail))


def row(fault: str, times: int, once: Callable[[], str | None]) -> Outcome:
    """`once` gives None where it held, else what was lost."""
    lost = [problem for problem in (once() for _ in range(times)) if problem]
    told = lost[0] if lost else "the item marked, the next ones judged"
    return Outcome(fault, times, times - len(lost), told)


def compared(draw: random.Random, number: signal.Signals, answer: str) -> str | None:
    """Strike the worker while it has (or is about to get) an item."""
    with mock.patch.object(symbolic, "ITEM_CPU_LIMIT_S", 2.0):
        worker = symbolic._idle.get()
        symbolic._idle.put(worker)  # last in, first out: the next item is for this one
        before = set(psutil.Process().children())
        if worker.child is None:
            return "no worker was there"
        pid, wait = worker.child.process.pid, draw.uniform(0.0, 0.3)
        if number is signal.SIGSTOP:
            os.kill(pid, number)
        else:
            threading.Timer(wait, lambda: os.kill(pid, number)).start()
        struck = symbolic.compare(GOLD, answer)
    if struck.status not in MARKED:
        return f"the item was scored {struck.value:g}"
    return whole(before)


def out_of_memory() -> str | None:
    """A worker with little memory gets an item that wants a lot."""
    taken = symbolic._idle.get()
    small = symbolic.Worker()
    try:
        # memory is what it fails by, not time
        small_limits = {"MEMORY_LIMIT": 300 << 20, "ITEM_CPU_LIMIT_S": 0.0}
        with mock.patch.multiple(symbolic, **small_limits, symbolic_worker=eating_worker):
            if small.ask({"gold": GOLD, "answer": RIGHT})["right"] is not True:
                return "the small worker does not work"
            symbolic._idle.put(small)
            score = symbolic.compare(GOLD, eating_worker.EATER)
            symbolic._idle.get()
        if not score.detail.endswith(f"code {symbolic_worker.OUT_OF_MEMORY}"):
            return f"the item is {score}"
    finally:
        small.close()
        symbolic._idle.put(taken)
    return whole(set(psutil.Process().children()))


def whole(before: set[psutil.Process]) -> str | None:
    """What is not as it was: workers in the pool, verdicts, processes left behind."""
    if symbolic._idle.qsize() != symbolic.WORKERS:
        return f"the pool has {symbolic._idle.qsize()} of {symbolic.WORKERS} workers"
    with mock.patch.object(symbolic, "ITEM_CPU_LIMIT_S", 60.0):  # a new worker is slow at first
        verdicts = [symbolic.compare(GOLD, answer) for answer in (RIGHT, WRONG, RIGHT)]
    if [(one.status, one.value) for one in verdicts] != [(Status.SCORED, value) for value in (1.0, 0.0, 1.0)]:
        return f"the next verdicts are {verdicts}"
    now = {child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}
    return f"{len(now - before)} processes more than before" if len(now - before) > symbolic.WORKERS else None


def interpreted(draw: random.Random, make: Callable[[], isolation.Isolation]) -> str | None:
    """Kill every process of an interpreter while a program runs in it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    isolations = [make()]
    # it is the blow that ends the loop, not its limit
    with (
        mock.patch.object(sandbox, "choose", lambda: isolations),
        mock.patch.object(check, "limits_of", lambda task: limits.Limits(600.0, 64 << 20)),
    ):
        if check_program(PROGRAM, DOUBLE).value != 1:  # its processes are there, and warm
            return "the interpreter does not work"

        def strike() -> None:
            time.sleep(draw.uniform(0.05, 0.3))
            for child in psutil.Process().children(recursive=True):
                if child.pid not in before:
                    child.kill()

        killer = threading.Thread(target=strike)
        killer.start()
        struck: Score = check_program(PROGRAM, LOOP)
        killer.join()
        if struck.status is not Status.INFRASTRUCTURE_FAILED:
            return f"the item whose interpreter was killed is {struck}"
        after = [check_program(PROGRAM, DOUBLE) for _ in range(3)]
    return None if [one.value for one in after] == [1.0] * 3 else f"the next verdicts are {after}"
