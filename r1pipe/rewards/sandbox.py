"""Isolation for generated programs: no network, files or environment; time, memory, depth, output bounded.

Chosen by capability, program by program: Monty first (`monty.py`, under a millisecond); what that part of
Python cannot run, and what fails there by an exception, goes to CPython in bubblewrap (`jail.py`). Where
neither is available no program is run.

A program's fault (an exception, a limit, an interpreter that it crashed) scores 0; VERIFIER_FAILED means
that no interpreter here can run it, INFRASTRUCTURE_FAILED that the isolation itself does not work or that the
machine is too busy for it.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import Any

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Score, Status
from r1pipe.rewards import isolation, jail
from r1pipe.rewards.isolation import Isolation, ProgramFault, SandboxBroken, Session, Unsupported
from r1pipe.rewards.monty import Monty

_choosing = threading.Lock()


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


def run_calls(program: str, entry_point: str, tests: Sequence[tuple[Sequence[Any], Any]]) -> Score:
    """1 where calling `entry_point` with each test's arguments returns what the test expects.

    What is expected never enters the program's interpreter. Raises EnvironmentProblem where this machine has
    no isolation to offer.
    """

    def judge(session: Session) -> Score:
        calls = f"[{entry_point}(*each) for each in _arguments]"
        results = session.run(calls, {"_arguments": [list(arguments) for arguments, _ in tests]})
        if not isinstance(results, list) or len(results) != len(tests):  # a program may forge replies
            raise ProgramFault("not a result for each call", final=True)
        passed = sum(map(isolation.same_value, results, [value for _, value in tests]))
        return Score(float(passed == len(tests)), detail=f"{passed} of {len(tests)} tests passed")

    return _first_verdict(program, judge)


def run_tests(program: str, entry_point: str, tests: str) -> Score:
    """1 where the program passes tests that are Python text; they call it by the name `candidate`.

    Program and tests are in two interpreters, and nothing but plain arguments and results goes between
    them: the program can neither read the tests nor change what they compare with. Raises as `run_calls`.
    """

    def judge(session: Session) -> Score:
        failure = _failed_test(session, entry_point, tests)
        return Score(float(failure is None), detail=failure or "the tests passed")

    return _first_verdict(program, judge)


def _first_verdict(program: str, judge: Callable[[Session], Score]) -> Score:
    """The verdict in the first isolation; after an exception in the program the next one tries."""
    score = Score(0.0, Status.VERIFIER_FAILED, "no verdict")
    for isolated in isolations():
        try:
            with isolated.session(isolation.CPU_LIMIT_S) as session:
                session.run(program)
                return judge(session)
        except ProgramFault as fault:
            score = Score(0.0, detail=str(fault))
            if fault.final:
                return score
        except Unsupported as lack:
            score = Score(0.0, Status.VERIFIER_FAILED, str(lack))
        except SandboxBroken as problem:
            score = Score(0.0, Status.INFRASTRUCTURE_FAILED, str(problem))
    return score


def _failed_test(session: Session, entry_point: str, tests: str) -> str | None:
    """Which test the program defined in `session` fails, by the first interpreter that can run the tests.

    Raises the program's own error; Unsupported where no interpreter can run the tests.
    """
    raised: list[Exception] = []

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        call = f"{entry_point}(*_arguments, **_keywords)"
        try:
            return isolation.plain(session.run(call, {"_arguments": list(arguments), "_keywords": keywords}))
        except (ProgramFault, Unsupported, SandboxBroken) as error:
            raised.append(error)
            name = str(error).partition(":")[0]
            known = {kind.__name__: kind for kind in (ValueError, TypeError, KeyError, IndexError)}
            raise known.get(name, RuntimeError)(str(error)) from None

    problem = ""
    for isolated in isolations():
        raised.clear()
        try:
            with isolated.session(isolation.CHECK_CPU_LIMIT_S) as tester:
                tester.run(tests, host={"candidate": candidate})
        except (ProgramFault, Unsupported, SandboxBroken) as error:
            if raised:
                raise raised[0] from None
            missing = str(error).startswith(("ModuleNotFoundError", "ImportError"))  # of the tests' own
            if _is_exception(error) and not missing:
                return str(error)
            problem = f"the tests cannot be run: {error}"
            continue
        # a fault that the tests expected and caught is no fault, but beyond a limit there is no passing
        beyond = [error for error in raised if not _is_exception(error)]
        if beyond:
            raise beyond[0]
        return None
    raise Unsupported(problem)


def _is_exception(error: Exception) -> bool:
    """Whether code raised an exception, rather than hitting a limit or an unsupported feature."""
    return isinstance(error, ProgramFault) and not error.final
