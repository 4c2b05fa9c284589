"""Programs: found in the summary, run against the prompt's tests in the sandbox.

Sample: Prompt(task="program", question="Write f(x) that doubles x.",
checker={"entry_point": "f", "tests": [[[2], 4], [[-1], -2]]}) and the summary "def f(x): return 2 * x".
"""

import ast
import math
import re

from r1pipe.errors import DataError
from r1pipe.records import Prompt, Score, Status
from r1pipe.rewards import sandbox

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_START = re.compile(r"(?:^|(?<=[\s:：是为]))(?=def |from \w+ import |import \w)", re.MULTILINE)
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))


def extract_program(summary: str) -> str | None:
    """The last fenced block that is Python, else what follows the first def or import as far as it is."""
    for block in reversed(_FENCE.findall(summary)):
        if _is_python(block):
            return block.strip("\n")
    starts = (_longest_python(summary[start.start() :]) for start in _START.finditer(summary))
    return next(filter(None, starts), None)


def _is_python(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _longest_python(text: str) -> str | None:
    """Drop trailing lines, and a trailing full stop, until what is left is Python."""
    lines = text.strip().splitlines()
    for end in range(len(lines), 0, -1):
        candidate = "\n".join(lines[:end]).rstrip()
        for program in (candidate, candidate.rstrip("。.")):
            if _is_python(program):
                return program
    return None


def check_program(prompt: Prompt, summary: str) -> Score:
    """1 where the program passes every test. The expected values never enter the sandbox."""
    program = extract_program(summary)
    if program is None:
        return Score(0.0, detail="the summary holds no program")
    tests = prompt.checker["tests"]
    outcome = sandbox.run(program, prompt.checker["entry_point"], [arguments for arguments, _ in tests])
    if outcome.status is not Status.SCORED:
        return Score(0.0, outcome.status, outcome.detail)
    if outcome.results is None:
        return Score(0.0, detail=outcome.detail)
    pairs = zip(outcome.results, tests, strict=True)
    passed = sum(same_value(result, expected) for result, (_, expected) in pairs)
    return Score(float(passed == len(tests)), detail=f"{passed} of {len(tests)} tests passed")


def same_value(result: object, expected: object) -> bool:
    """Python's ==, but floats to 1e-9 and lists like tuples (JSON knows only lists).

    Anything that is not a plain built-in value is never equal: an object of the program's own has no say.
    """
    if isinstance(expected, list | tuple):
        if not isinstance(result, list | tuple) or len(result) != len(expected):
            return False
        return all(map(same_value, result, expected))
    if isinstance(expected, dict):
        if not isinstance(result, dict) or result.keys() != expected.keys():
            return False
        return all(same_value(result[key], expected[key]) for key in expected)
    if type(result) not in _PLAIN_TYPES:
        return False
    if isinstance(expected, float) and isinstance(result, int | float):
        small = abs(result) < 1e300  # a larger integer does not fit a float
        return result == expected or (small and math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12))
    return bool(result == expected)


def program_key(summary: str) -> str:
    """One spelling for programs that differ only in layout and comments, for voting."""
    program = extract_program(summary)
    return ast.unparse(ast.parse(program)) if program else ""


def check_program_gold(prompt: Prompt) -> None:
    """Raises DataError where the tests are missing or cannot be run."""
    tests, entry = prompt.checker.get("tests"), prompt.checker.get("entry_point", "")
    if not isinstance(entry, str) or not entry.isidentifier():
        raise DataError(f"{prompt.id}: checker.entry_point {entry!r} is no function's name; give one")
    many = list | tuple
    if not tests or not all(isinstance(t, many) and len(t) == 2 and isinstance(t[0], many) for t in tests):
        raise DataError(
            f"{prompt.id}: checker.tests is no list of [[arguments...], expected]; write one test"
        )
