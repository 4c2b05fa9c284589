"""The pool that compares answers: a hard limit per item, and one bad item costs only itself."""

import os
import signal
import threading
from contextlib import suppress
from queue import LifoQueue
from types import SimpleNamespace

import eating_worker
import psutil
import pytest
from busy import busy_processor

from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import score_all, symbolic, symbolic_worker

ROOT_TWO = r"\boxed{2^{1/2}}"
ENDLESS = r"\prod_{k=1}^{10^{6}} k"


def scored(*summaries):
    """Verdicts on answers to as many prompts whose gold is the square root of 2."""
    prompts = [Prompt(f"word-{i}", "word", "en", "?", r"\sqrt{2}") for i in range(len(summaries))]
    completions = [Completion([1], [0.0], "stop", f"<think>\nx\n</think>\n\n{text}") for text in summaries]
    return [row["accuracy"] for row in score_all(prompts, completions, ["accuracy"])]


def use(monkeypatch, worker):
    """Let this worker alone judge."""
    idle = LifoQueue()
    idle.put(worker)
    monkeypatch.setattr(symbolic, "_idle", idle)


def test_an_item_that_hangs_fails_alone(monkeypatch):
    monkeypatch.setattr(symbolic, "ITEM_CPU_LIMIT_S", 2.5)
    first, *others = scored(rf"\boxed{{{ENDLESS}}}", *[ROOT_TWO] * 3)
    assert first == Score(0.0, Status.VERIFIER_FAILED, "no verdict within 2.5 s of processor time")
    assert others == [Score(1.0)] * 3


def test_an_item_that_eats_memory_fails_alone(monkeypatch):
    limit = 300 << 20
    monkeypatch.setattr(symbolic, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(symbolic, "ITEM_CPU_LIMIT_S", 0.0)  # none: memory is what it fails by
    monkeypatch.setattr(symbolic, "symbolic_worker", eating_worker)
    worker = symbolic.Worker()
    use(monkeypatch, worker)
    assert symbolic.compare(r"\sqrt{2}", "2^{1/2}") == Score(1.0)
    with PeakMemory(worker.child.process.pid) as peak:
        eater = symbolic.compare(r"\sqrt{2}", eating_worker.EATER)
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
    use(monkeypatch, worker)
    assert symbolic.compare("x", "x") == Score(1.0) and held
    worker.close()


def test_a_worker_that_is_killed_is_replaced(monkeypatch):
    worker = symbolic.Worker()
    use(monkeypatch, worker)
    assert symbolic.compare("x", "x") == Score(1.0)
    os.kill(worker.child.process.pid, signal.SIGKILL)
    worker.child.process.wait()
    assert symbolic.compare("x", "x") == Score(1.0)  # its end is seen before the next item
    os.kill(worker.child.process.pid, signal.SIGSTOP)
    assert symbolic.compare("x", "x").status is Status.VERIFIER_FAILED
    assert symbolic.compare("x", "x") == Score(1.0)
    worker.close()


def test_a_verifier_that_cannot_start_is_infrastructure(monkeypatch):
    monkeypatch.setattr(symbolic.sys, "executable", "/bin/false")
    worker = symbolic.Worker()
    use(monkeypatch, worker)
    assert symbolic.compare("x", "y").status is Status.INFRASTRUCTURE_FAILED


def test_a_stopped_worker_that_cannot_take_a_long_answer_is_given_up(monkeypatch):
    worker = symbolic.Worker()
    use(monkeypatch, worker)
    assert symbolic.compare("x", "x") == Score(1.0)
    os.kill(worker.child.process.pid, signal.SIGSTOP)
    assert symbolic.compare("x", "1" * (1 << 20)).status is Status.VERIFIER_FAILED  # more than a pipe holds
    worker.close()


SLOW = """
import sys, time
from r1pipe.rewards import symbolic_worker

def slow(gold, answer, relation=""):
    began = time.process_time()
    while time.process_time() - began < 2: pass
    return {"right": True, "error": ""}

symbolic_worker.compare = slow
symbolic_worker.serve(int(sys.argv[1]))
"""


@pytest.mark.slow
def test_an_item_is_judged_on_a_busy_processor_as_on_an_idle_one(monkeypatch, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    monkeypatch.setattr(symbolic, "symbolic_worker", SimpleNamespace(__file__=str(script)))
    worker = symbolic.Worker()
    use(monkeypatch, worker)
    with busy_processor():  # its two seconds take ten on the clock
        assert symbolic.compare("x", "y") == Score(1.0)
    worker.close()
