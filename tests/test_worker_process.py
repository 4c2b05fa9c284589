"""Worker processes: a reply, or why there is none; a busy machine is never the child's fault."""

import os
import sys

import pytest
from busy import busy_processor

from r1pipe.rewards import worker_process
from r1pipe.rewards.worker_process import (
    ChildAsleep,
    ChildEnded,
    MachineBusy,
    NoReply,
    OutOfTime,
    WorkerProcess,
)

ECHO = "for line in sys.stdin: print(line, end='', flush=True)"
WORKS_AS_TOLD = """
import json
for line in sys.stdin:
    end = time.process_time() + json.loads(line)["s"]
    while time.process_time() < end: pass
    print("{}", flush=True)
"""
IGNORES_SIGNALS = (
    "signal.signal(signal.SIGXCPU, signal.SIG_IGN), signal.signal(signal.SIGPROF, signal.SIG_IGN)\n"
)
BUSY = "while time.process_time() - began < {}: pass"


@pytest.fixture
def start():
    """Starts children that run Python code once they have read a line."""
    children = []

    def started(code, read=True):
        head = "import os, signal, sys, time\nbegan = time.process_time()\n" + "sys.stdin.readline()\n" * read
        children.append(WorkerProcess([sys.executable, "-c", head + code], env={}))
        return children[-1]

    yield started
    for child in children:
        child.close()


def test_messages_of_any_size_are_answered_in_turn(start):
    child = start(ECHO, read=False)
    for size in (1, 1 << 10, 1 << 16):
        assert child.ask({"text": "ä" * size}) == {"text": "ä" * size}


def test_several_replies_to_one_message_come_until_the_child_ends(start):
    child = start("for n in range(2): print('{\"n\": %d}' % n, flush=True)")
    replies = child.ask_for_each({}, 3)
    assert [next(replies), next(replies)] == [{"n": 0}, {"n": 1}]
    with pytest.raises(ChildEnded):
        next(replies)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("sys.exit(3)", "code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "code -9"),
        ("os.close(1)\ntime.sleep(1000)", "closed its pipes"),
        ("print('{', flush=True)", "not JSON"),
        ("print('[' * 100000, flush=True)", "not JSON"),
        ("print('[1]', flush=True)", "not a JSON object"),
        ("while True: print('x' * 1000, end='')", "the reply is too long"),
    ],
)
def test_what_is_no_reply_is_told_apart(start, code, problem):
    with pytest.raises(NoReply, match=problem):
        start(code).ask({})


def test_a_child_that_has_ended_takes_no_message(start):
    child = start("sys.exit(3)", read=False)
    child.process.wait()
    assert child.has_ended()
    with pytest.raises(ChildEnded) as ended:
        child.ask({})
    assert ended.value.code == 3


@pytest.mark.parametrize(
    "code",
    [
        "time.sleep(1000)",
        "while True: time.sleep(0.3)",
        "while True: time.sleep(0.3), print(end='x', flush=True)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_a_child_that_sleeps_is_not_waited_for(start, code):
    with pytest.raises(ChildAsleep):
        start(code).ask({})


def test_a_child_that_stops_reading_is_not_waited_for(start):
    child = start("time.sleep(1000)", read=False)
    with pytest.raises(ChildAsleep):
        child.ask({"text": "x" * (1 << 20)})


def test_the_allowance_of_sleep_is_for_one_request(start, monkeypatch):
    monkeypatch.setattr(worker_process, "SLEEP_LIMIT_S", 3)
    child = start("for line in sys.stdin: time.sleep(2), print('{}', flush=True)", read=False)
    for _ in range(2):
        child.ask({})
    child.ask({}, may_sleep=True)
    assert not child.has_ended()


def test_a_child_that_waits_for_its_turn_does_not_sleep(start, monkeypatch):
    monkeypatch.setattr(worker_process, "SLEEP_LIMIT_S", 2)
    with busy_processor():
        assert start(BUSY.format(1.5) + "\nprint('{}', flush=True)").ask({}) == {}


def test_a_child_that_does_not_get_its_share_of_the_machine_is_not_to_blame(start, monkeypatch):
    monkeypatch.setattr(worker_process, "WALL_LIMIT_S", 2.0)
    with pytest.raises(MachineBusy):
        start(BUSY.format(1000)).ask({})


def test_the_parent_s_clock_ends_a_child_that_takes_too_much_processor_time(start):
    child = start(WORKS_AS_TOLD, read=False)
    with busy_processor():
        for _ in range(3):
            child.limit_cpu(0.5)  # for each request anew
            assert child.ask({"s": 0.3}) == {}
        child.limit_cpu(0.2)
        with pytest.raises(OutOfTime):
            child.ask({"s": 1000})
    child = start(IGNORES_SIGNALS + BUSY.format(1000))
    child.limit_cpu(0.2)
    with pytest.raises(OutOfTime):
        child.ask({})


def test_a_reply_may_be_as_long_as_is_said(start):
    code = "import sys; sys.stdin.readline(); print('{\"x\": \"' + 'x' * (3 << 20) + '\"}')"
    child = WorkerProcess([sys.executable, "-c", code], {}, reply_limit=4 << 20)
    assert len(child.ask({})["x"]) == 3 << 20
    child.close()
    with pytest.raises(NoReply, match="too long"):
        start("print('x' * (2 << 20))").ask({})


def test_nothing_of_a_closed_child_is_left(start):
    child = start("time.sleep(1000)")
    child.close()
    assert child.has_ended() and not os.path.exists(f"/proc/{child.process.pid}")
