"""Programs: found in the summary, run against the prompt's tests in the sandbox.

Sample: Prompt(task="program", question="Write f(x) that doubles x.",
checker={"entry_point": "f", "tests": [[[2], 4], [[-1], -2]]}) and the summary "def f(x): return 2 * x".
tasks.py has the forms of tests. Expected results never enter the program's interpreter.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from r1pipe.core import python_source
from r1pipe.core.errors import DataError
from r1pipe.core.types import Prompt, Score
from r1pipe.rewards.programs import sandbox
from r1pipe.rewards.programs.extraction import find_function, find_script, function_program
from r1pipe.rewards.programs.limits import limits_of
from r1pipe.rewards.programs.sandbox import TestCode
from r1pipe.rewards.programs.tasks import check_task, kind_of, parsed

NO_PROGRAM = Score(0.0, detail="the summary holds no program")


def check_program(prompt: Prompt, summary: str) -> Score:
    """1 where the program passes every test; the share that it passes with `partial_credit`.

    Raises EnvironmentProblem where this machine has no isolation.
    """
    task = prompt.checker
    tests, kind, limits = task["tests"], kind_of(task["tests"]), limits_of(task)
    if kind == "programs":
        script = find_script(summary)
        return NO_PROGRAM if script is None else sandbox.run_script(script, tests, limits)
    context, entry_point = task.get("prompt", ""), task["entry_point"]
    program = function_program(context, summary, entry_point)
    if program is None:
        return NO_PROGRAM
    if kind == "asserts":
        return sandbox.run_tests(program, test_code(context, entry_point, tests), limits)
    return sandbox.run_calls(program, tests, limits, bool(task.get("either")))


def test_code(context: str, entry_point: str, tests: str | list[str]) -> TestCode:
    """Tests for their own interpreter: the question's helpers, a proxy of the program, the asserts."""
    setup = f"{context}\n{entry_point} = candidate\n"
    if not isinstance(tests, str):
        single = all(parsed(test) and "assert" in test for test in tests)
        return TestCode(setup, tuple(tests) if single else ("\n".join(tests),))
    call = "\ncheck(candidate)\n" if re.search(r"^def check\(", tests, re.MULTILINE) else ""
    return TestCode(setup, (tests + call,))


def check_program_gold(prompt: Prompt) -> None:
    """Raises DataError where the tests are missing or cannot be run."""
    try:
        check_task(prompt.checker)
    except DataError as error:
        raise DataError(f"{prompt.id}: {error}") from None


def vote_of_program(task: Mapping[str, Any], summary: str) -> str:
    """One spelling for programs that differ only in layout and comments, for voting; "" for none."""
    entry_point = task.get("entry_point", "")
    program = find_function(summary, entry_point) if entry_point else find_script(summary)
    return unparsed(python_source.parse(program), program) if program else ""


def unparsed(tree: ast.AST, text: str) -> str:
    """Python's own spelling of a tree; the text that it was parsed from where it is nested too deeply."""
    try:
        return ast.unparse(tree)
    except RecursionError:
        return text
