"""Isolation for generated programs: no network, files or environment; time, memory, depth, output bounded.

Chosen by capability, program by program: Monty first (`monty.py`, under a millisecond), with a short share of
the time; what that part of Python cannot run, and what fails there, goes to CPython in bubblewrap
(`jail.py`), which has the last word: Monty orders sets and rounds halves in its own way. Where neither is
available no program is run.

A program's fault (an exception, a limit, an interpreter that it crashed) scores 0; VERIFIER_FAILED means
that no interpreter here can run it, INFRASTRUCTURE_FAILED that the isolation itself does not work or that the
machine is too busy for it.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Score, Status
from r1pipe.rewards.programs import isolation, jail
from r1pipe.rewards.programs.comparison import same_output, same_value
from r1pipe.rewards.programs.extraction import Program, is_exact
from r1pipe.rewards.programs.isolation import Isolation, ProgramFault, SandboxBroken, Session, Unsupported
from r1pipe.rewards.programs.limits import Limits
from r1pipe.rewards.programs.monty import Monty
from r1pipe.runs import heartbeat

SHARE_S = 1.0  # processor time of a request where another interpreter comes after
TESTS_CPU_S = 10.0  # of all tests that are Python text together; the program's calls have their own time
_choosing = threading.Lock()

Judge = Callable[[Session, bool], Score]  # a session, and whether it has the last word


class CannotTest(Exception):
    """An interpreter cannot run tests that are Python text."""


class TestCode(NamedTuple):
    """Tests that are Python text and call the program by the name `candidate`."""

    setup: str
    parts: tuple[str, ...]  # assert lines, or one text


def isolations() -> list[Isolation]:
    """This machine's isolations, in order of preference. Raises EnvironmentProblem where there is none."""
    with _choosing:  # threads that come first together must not each start a pool
        return choose()


@functools.cache
def choose() -> list[Isolation]:
    """See `isolations`; the result is kept for the life of the process."""
    available: list[Isolation] = []
    if importlib.util.find_spec("pydantic_monty"):
        available.append(Monty())
    if jail.is_available():
        available.append(jail.Jail())
    if not available:
        raise EnvironmentProblem(
            "no isolation for generated programs: run `pip install pydantic-monty`, or install bubblewrap"
        )
    return available


def run_calls(program: Program, tests: Sequence[Any], limits: Limits, either: bool = False) -> Score:
    """1 where calling the entry point with each test's arguments returns what the test expects.

    `tests` are [arguments, expected]; with `either`, [x] is expected as x or [x]. Raises EnvironmentProblem
    where this machine has no isolation to offer.
    """

    def judge(session: Session, last: bool) -> Score:
        define(session, program)

        def passes(test: Any) -> bool:
            arguments, expected = test
            result = session.run(f"{program.call}(*_arguments)", {"_arguments": list(arguments)})
            is_wrapped = either and isinstance(expected, list) and len(expected) == 1
            return same_value(result, expected) or (is_wrapped and same_value(result, expected[0]))

        return confirmed(count(passes, tests, limits.partial_credit, last), last or is_exact(program))

    return first_verdict(judge, limits)


def run_script(script: str, tests: Sequence[Any], limits: Limits) -> Score:
    """1 where the program writes each test's output when it reads the test's input; raises as `run_calls`."""

    def judge(session: Session, last: bool) -> Score:
        def passes(test: Any) -> bool:
            return same_output(session.run_script(script, test[0]), test[1])

        return count(passes, tests, limits.partial_credit, last)

    return first_verdict(judge, limits)


def run_tests(program: Program, tests: TestCode, limits: Limits) -> Score:
    """1 where the program passes tests that are Python text; raises as `run_calls`.

    Program and tests are in two interpreters, and nothing but plain arguments and results goes between
    them: the program can neither read the tests nor change what they compare with. Partial credit counts
    assert lines.
    """

    def judge(session: Session, last: bool) -> Score:
        define(session, program)
        return confirmed(_judged_by_tests(session, program.call, tests, limits, last), last)

    return first_verdict(judge, limits)


def define(session: Session, program: Program) -> None:
    """Run a program's statements; those after the entry point's definition may fail (usage, asserts)."""
    session.run(program.needed)
    for statement in program.rest:
        try:
            session.run(statement)
        except ProgramFault as fault:
            if fault.ended:
                raise


def count(passes: Callable[[Any], bool], tests: Iterable[Any], partial: bool, last: bool) -> Score:
    """The score of tests that are run one by one, up to the first that fails; with `partial`, up to the end.

    An exception is a failed test where this interpreter has the last word, else it is raised.
    """
    tests = list(tests)
    passed, failed = 0, ""
    for number, test in enumerate(tests, 1):
        heartbeat.tick()
        why, ended = "", False
        try:
            why = "" if passes(test) else "wrong result"
        except ProgramFault as fault:
            if not last:
                raise
            why, ended = str(fault) or "an exception", fault.ended
        passed += not why
        failed = failed or (f"test {number} of {len(tests)}: {why}" if why else "")
        if ended or (why and not partial):
            break
    value = passed / len(tests) if partial else float(passed == len(tests))
    detail = f"{passed} of {len(tests)} tests passed"
    return Score(value, detail=f"{detail}; {failed}" if failed else detail)


def confirmed(score: Score, certain: bool) -> Score:
    """A score that counts: 1, or one that no other interpreter would change. Raises ProgramFault."""
    if score.value < 1.0 and not certain:
        raise ProgramFault(score.detail)
    return score


def first_verdict(judge: Judge, limits: Limits) -> Score:
    """The verdict of the first isolation that has one; after a fault of the program the next one tries."""
    score = Score(0.0, Status.VERIFIER_FAILED, "no verdict")
    available = isolations()
    for isolated in available:
        last = isolated is available[-1]
        cpu_s = limits.cpu_s if last else min(limits.cpu_s, SHARE_S)
        try:
            with isolated.session(cpu_s, limits.memory) as session:
                return judge(session, last)
        except ProgramFault as fault:
            score = Score(0.0, detail=str(fault))
        except Unsupported as lack:
            score = Score(0.0, Status.VERIFIER_FAILED, str(lack))
        except SandboxBroken as problem:
            score = Score(0.0, Status.INFRASTRUCTURE_FAILED, str(problem))
    return score


class _Caller:
    """The program as tests know it: each call is a request to its session."""

    def __init__(self, session: Session, call: str):
        self.session, self.call = session, call
        self.raised: list[Exception] = []  # by the program, since the part of the tests that runs now began

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        inputs = {"_arguments": list(arguments), "_keywords": keywords}
        try:
            return isolation.plain(self.session.run(f"{self.call}(*_arguments, **_keywords)", inputs))
        except (ProgramFault, Unsupported, SandboxBroken) as error:
            self.raised.append(error)
            name = str(error).partition(":")[0]
            known = {kind.__name__: kind for kind in (ValueError, TypeError, KeyError, IndexError)}
            raise known.get(name, RuntimeError)(str(error)) from None

    def passes(self, part: str, tester: Session) -> bool:
        """Whether a part of the tests passes. Raises the program's own error; CannotTest where the tester
        lacks something."""
        self.raised.clear()
        try:
            tester.run(part, host={"candidate": self})
        except (ProgramFault, Unsupported, SandboxBroken) as error:
            if self.raised:
                raise self.raised[0] from None
            is_missing = str(error).startswith(("ModuleNotFoundError", "ImportError"))
            if _is_exception(error) and not is_missing:
                return False
            raise CannotTest(str(error)) from None
        # a fault that the tests expected and caught is no fault, but beyond a limit there is no passing
        for fault in self.raised:
            if not _is_exception(fault):
                raise fault
        return True


def _judged_by_tests(session: Session, call: str, tests: TestCode, limits: Limits, last: bool) -> Score:
    """The verdict of tests on the program defined in `session`, by the first interpreter that can run them.

    Raises the program's own error; Unsupported where no interpreter can run the tests.
    """
    caller, problem = _Caller(session, call), ""
    for isolated in reversed(isolations()) if last else isolations():
        with isolated.session(TESTS_CPU_S, limits.memory) as tester:
            try:
                caller.passes(tests.setup, tester)
                passes = functools.partial(caller.passes, tester=tester)
                return count(passes, tests.parts, limits.partial_credit, last)
            except CannotTest as error:
                problem = f"the tests cannot be run: {error}"
    raise Unsupported(problem)


def _is_exception(error: Exception) -> bool:
    """Whether code raised an exception, rather than hitting a limit or an unsupported feature."""
    return isinstance(error, ProgramFault) and not error.ended
