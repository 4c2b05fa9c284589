"""The pool that compares answers: a hard limit per item, and one bad item costs only itself."""

import os
import signal
import threading
import time
from contextlib import suppress

import psutil

from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import score_all, symbolic, symbolic_worker

ROOT_TWO = r"\boxed{2^{1/2}}"


def scored(*summaries):
    """Verdicts on answers to as many prompts whose gold is the square root of 2."""
    prompts = [Prompt(f"word-{i}", "word", "en", "?", r"\sqrt{2}") for i in range(len(summaries))]
    completions = [Completion([1], [0.0], "stop", f"<think>\nx\n</think>\n\n{text}") for text in summaries]
    return [row["accuracy"] for row in score_all(prompts, completions, ["accuracy"])]


def test_an_item_that_hangs_fails_alone(monkeypatch):
    monkeypatch.setattr(symbolic, "ITEM_LIMIT_S", 2.5)
    first, *others = scored(r"\boxed{9^{9^{9^9}}}", *[ROOT_TWO] * 3)
    assert first.status is Status.VERIFIER_FAILED
    assert others == [Score(1.0)] * 3


def test_an_item_that_eats_memory_fails_alone(monkeypatch):
    limit = 300 << 20
    monkeypatch.setattr(symbolic, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(symbolic, "ITEM_LIMIT_S", 120.0)  # memory is what it fails by
    worker = symbolic.Worker()
    monkeypatch.setattr(symbolic, "_ask", worker.ask)
    assert symbolic.compare(r"\sqrt{2}", "2^{1/2}") == Score(1.0)
    with PeakMemory(worker.process.pid) as peak:
        eater = symbolic.compare(r"\sqrt{2}", r"10^{10^{8}}!")  # of 10^8 digits, and then its factorial
    assert eater.status is Status.VERIFIER_FAILED
    assert eater.detail.endswith(f"code {symbolic_worker.OUT_OF_MEMORY}")
    assert limit / 2 < peak.bytes < limit
    assert symbolic.compare(r"\sqrt{2}", "2^{1/2}") == Score(1.0)
    worker.close()


class PeakMemory(threading.Thread):
    """The most memory that a process is seen to hold until the end of a `with` block."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.process, self.bytes, self.over = psutil.Process(pid), 0, threading.Event()

    def run(self):
        while not self.over.wait(0.01):
            with suppress(psutil.Error):
                self.bytes = max(self.bytes, self.process.memory_info().rss)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.join()


def test_the_memory_of_the_trainer_is_not_its_workers(monkeypatch):
    monkeypatch.setattr(symbolic, "MEMORY_LIMIT", 400 << 20)
    held = b"x" * (300 << 20)  # more than a worker may hold
    worker = symbolic.Worker()
    monkeypatch.setattr(symbolic, "_ask", worker.ask)
    assert symbolic.compare("x", "x") == Score(1.0) and held
    worker.close()


def test_a_worker_that_is_killed_is_replaced(monkeypatch):
    worker = symbolic.Worker()
    monkeypatch.setattr(symbolic, "_ask", worker.ask)
    assert symbolic.compare("x", "x") == Score(1.0)
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert symbolic.compare("x", "x") == Score(1.0)  # its end is seen before the next item
    os.kill(worker.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(symbolic, "ITEM_LIMIT_S", 0.2)
    assert symbolic.compare("x", "x").status is Status.VERIFIER_FAILED
    monkeypatch.setattr(symbolic, "ITEM_LIMIT_S", 5.0)
    assert symbolic.compare("x", "x") == Score(1.0)
    worker.close()


def test_a_verifier_that_cannot_start_is_infrastructure(monkeypatch):
    monkeypatch.setattr(symbolic.sys, "executable", "/bin/false")
    worker = symbolic.Worker()
    monkeypatch.setattr(symbolic, "_ask", worker.ask)
    assert symbolic.compare("x", "y").status is Status.INFRASTRUCTURE_FAILED


def test_plain_numbers_are_checked_at_2000_a_second_and_more():
    prompts = [Prompt(f"word-{i}", "word", "en", "?", str(i)) for i in range(6000)]
    texts = [f"<think>\nx\n</think>\n\nThe answer is {i + i % 2}." for i in range(6000)]
    completions = [Completion([1], [0.0], "stop", text) for text in texts]
    began = time.process_time()
    scores = score_all(prompts, completions, ["accuracy"])
    assert sum(row["accuracy"].value for row in scores) == 3000
    assert time.process_time() - began < 3  # a tenth of this on an idle core


def test_a_stopped_worker_that_cannot_take_a_long_answer_is_given_up_in_time(monkeypatch):
    worker = symbolic.Worker()
    monkeypatch.setattr(symbolic, "_ask", worker.ask)
    assert symbolic.compare("x", "x") == Score(1.0)
    os.kill(worker.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(symbolic, "ITEM_LIMIT_S", 0.5)
    began = time.monotonic()
    assert symbolic.compare("x", "1" * (1 << 20)).status is Status.VERIFIER_FAILED  # more than a pipe holds
    assert time.monotonic() - began < 10
    worker.close()
