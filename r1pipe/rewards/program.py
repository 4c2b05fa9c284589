"""Programs: found in the summary, run against the prompt's tests in the sandbox.

Sample: Prompt(task="program", question="Write f(x) that doubles x.",
checker={"entry_point": "f", "tests": [[[2], 4], [[-1], -2]]}) and the summary "def f(x): return 2 * x".
Tests may also be Python text, as HumanEval has them ("def check(candidate): ...") or a list of assert lines;
then checker["prompt"] is what a completion continues: imports, helpers, the function's head.
"""

import ast
import itertools
import re
import textwrap
from collections.abc import Sequence

from r1pipe.core.errors import DataError
from r1pipe.core.types import Prompt, Score
from r1pipe.rewards import sandbox

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_START = re.compile(r"(?:^|(?<=[\s:：是为]))(?=def |from \w+ import |import \w)", re.MULTILINE)
_MAX_PROGRAM = 64 << 10  # characters; these three bound the work on a hostile text
_MAX_CUTS = 50  # times that a text is cut back until it is Python
_MAX_STARTS = 8


def extract_program(summary: str) -> str | None:
    """The last fenced block that is Python, else the longest Python text from the first def or import."""
    for block in reversed(_FENCE.findall(summary)):
        if _is_python(block):
            return block.strip("\n")
    return _from_first_start(summary)


def _fault_line(text: str) -> int | None:
    """The line (from 1) where a text stops being Python; None where it is Python."""
    try:
        return None if ast.parse(text).body else 1
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1


def _is_python(text: str) -> bool:
    return len(text) <= _MAX_PROGRAM and _fault_line(text) is None


def _longest_python(text: str, kept: str = "") -> str | None:
    """`kept` and as many of the text's first lines as are Python, with or without a trailing full stop."""
    lines = text[:_MAX_PROGRAM].rstrip().splitlines()
    above, end = kept.count("\n"), len(lines)
    for _ in range(_MAX_CUTS):
        if end <= 0 or not "".join(lines[:end]).strip():
            return None
        candidate = kept + "\n".join(lines[:end]).rstrip()
        for program in (candidate, candidate.rstrip("。.")):
            fault = _fault_line(program)
            if fault is None:
                return program
        end = min(end - 1, max((fault or 1) - above - 1, 1))
    return None


def check_program(prompt: Prompt, summary: str) -> Score:
    """1 where the program passes every test. Expected results never enter the program's interpreter."""
    checker = prompt.checker
    context, entry_point, tests = checker.get("prompt", ""), checker["entry_point"], checker["tests"]
    program = complete(context, summary, entry_point) if context else extract_program(summary)
    if program is None:
        return Score(0.0, detail="the summary holds no program")
    if is_test_code(tests):
        return sandbox.run_tests(program, entry_point, tests_as_script(context, entry_point, tests))
    return sandbox.run_calls(program, entry_point, tests)


def is_test_code(tests: object) -> bool:
    """Whether tests are Python text, not pairs of arguments and result."""
    return isinstance(tests, str) or (isinstance(tests, list) and all(isinstance(t, str) for t in tests))


def tests_as_script(context: str, entry_point: str, tests: str | Sequence[str]) -> str:
    """The code for the tests' interpreter: the question's helpers, a proxy of the program, the tests."""
    lines = tests if isinstance(tests, str) else "\n".join(tests)
    calls = "check(candidate)\n" if re.search(r"^def check\(", lines, re.MULTILINE) else ""
    return f"{context}\n{entry_point} = candidate\n{lines}\n{calls}"


def complete(context: str, summary: str, entry_point: str) -> str | None:
    """The program of a completion of `context`, a function's head and docstring after its imports.

    The completion may write the whole function (in a code block, or as it is) or its body alone.
    """
    blocks = _FENCE.findall(summary + "\n")
    for text in (*reversed(blocks), summary):
        if re.search(rf"^(?:async )?def {entry_point}\b", text, re.MULTILINE):
            program = text if text in blocks and _is_python(text) else _from_first_start(text)
            if program is not None:
                return f"{context}\n{program}"
    for body in (*reversed(blocks), summary):
        # as it is; with the first line's indentation, which stripping takes; without any
        for text in (body, "    " + body.lstrip(" \t"), textwrap.indent(body, "    ")):
            if not text.strip() or not text.lstrip("\n").startswith((" ", "\t")):
                continue
            if program := _longest_python(text, kept=context.rstrip() + "\n"):
                return program
    return None


def _from_first_start(text: str) -> str | None:
    for start in itertools.islice(_START.finditer(text[:_MAX_PROGRAM]), _MAX_STARTS):
        if program := _longest_python(text[start.start() :].lstrip()):
            return program
    return None


def program_key(summary: str) -> str:
    """One spelling for programs that differ only in layout and comments, for voting."""
    program = extract_program(summary)
    return unparsed(ast.parse(program), program) if program else ""


def unparsed(tree: ast.AST, text: str) -> str:
    """Python's own spelling of a tree; the text that it was parsed from where it is nested too deeply."""
    try:
        return ast.unparse(tree)
    except RecursionError:
        return text


def check_program_gold(prompt: Prompt) -> None:
    """Raises DataError where the tests are missing or cannot be run."""
    tests, entry = prompt.checker.get("tests"), prompt.checker.get("entry_point", "")
    if not isinstance(entry, str) or not entry.isidentifier():
        raise DataError(f"{prompt.id}: checker.entry_point {entry!r} is not a function name; give one")
    if tests and is_test_code(tests):
        text = tests_as_script(prompt.checker.get("prompt", ""), entry, tests)
        if not _is_python(text):
            raise DataError(f"{prompt.id}: the prompt and its tests are not Python; correct them")
        if "assert" not in text:
            raise DataError(f"{prompt.id}: the tests assert nothing; write one assert")
        return
    many = list | tuple
    if not tests or not all(isinstance(t, many) and len(t) == 2 and isinstance(t[0], many) for t in tests):
        raise DataError(
            f"{prompt.id}: checker.tests is no list of [[arguments...], expected]; write one test"
        )
